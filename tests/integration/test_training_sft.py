"""The cold-start command on real verl: trains with AGTO, resumes, and leaves a model that transformers loads."""

import os
import subprocess
import sys
import time

import pytest
import torch

from verl_avar.training.checkpoint import latest_model, latest_step
from verl_avar.training.metrics import read_steps
from verl_avar.training.whole_checkpoints import fault


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    from verl_avar.compat import torchvision_ops

    torchvision_ops.apply()
    from verl_avar.miniature.data import write_sft
    from verl_avar.miniature.model import build_model, build_processor, save
    from verl_avar.miniature.tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("sft")
    tokenizer = build_tokenizer(samples=500)
    save(folder / "model", build_model(tokenizer), build_processor(tokenizer))
    write_sft(folder / "sft.parquet", 32, seed=0)
    return folder


def command(inputs, steps, out, ranks=1):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    trainer = [sys.executable, *torchrun, "-m", "verl_avar.training.sft", "--config-name", "sft_cpu"]
    settings = {
        "model.path": inputs / "model",
        "data.train_files": inputs / "sft.parquet",
        "data.train_batch_size": 8,
        "data.micro_batch_size_per_gpu": 4,
        "trainer.default_local_dir": out,
        "trainer.total_training_steps": steps,
        "trainer.save_freq": 2,
    }
    return [*trainer, *(f"{key}={value}" for key, value in settings.items())]


ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "VERL_FILE_LOGGER_PATH"}


def train(inputs, steps, out, *more, ranks=1):
    return subprocess.run(
        [*command(inputs, steps, out, ranks), *more],
        capture_output=True,
        text=True,
        timeout=300,
        env=ENVIRONMENT,
        cwd=inputs,
    )


@pytest.fixture(scope="module")
def trained(inputs):
    out = inputs / "checkpoints"
    done = train(inputs, 3, out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


def test_metrics_of_every_step_hold_masses_and_objective(trained):
    steps = read_steps(trained / "metrics.jsonl")
    assert [step["step"] for step in steps] == [1, 2, 3]
    for step in steps:
        assert 0 < step["attention/visual_mass"] < 1 and 0 < step["attention/system_mass"] < 1
        assert step["attention/vas_response"] > 0
        assert step["agto/loss"] == pytest.approx(0.01 * (step["agto/enhance"] + step["agto/suppress"]), rel=1e-5)


def test_checkpoint_loads_in_transformers_and_differs_from_the_base(inputs, trained):
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    folder = latest_model(trained)
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(inputs / "model").state_dict()
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config._attn_implementation == "sdpa"  # ours is chosen at run time, not saved
    assert any(not torch.equal(value, base[name]) for name, value in model.state_dict().items())
    assert len(AutoProcessor.from_pretrained(folder).tokenizer) == model.config.text_config.vocab_size


def test_second_start_resumes_where_the_first_stopped(inputs, trained):
    again = train(inputs, 4, trained)
    assert again.returncode == 0, again.stderr[-3000:]
    assert latest_step(trained) == 4
    assert [step["step"] for step in read_steps(trained / "metrics.jsonl")] == [1, 2, 3, 4]
    assert (trained / "metrics.0.jsonl").exists()


def test_two_ranks_take_the_steps_of_one(inputs, trained, tmp_path):
    done = train(inputs, 3, tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = read_steps(trained / "metrics.jsonl"), read_steps(tmp_path / "metrics.jsonl")
    for single, double in zip(one[:3], two, strict=True):
        for name in single:
            if name.startswith(("agto/", "attention/", "train/grad_norm", "train/loss")):
                assert double[name] == pytest.approx(single[name], rel=1e-3, abs=1e-5), name


def test_wrong_role_and_unknown_key_end_with_one_line(inputs, tmp_path):
    import pandas as pd

    unknown = train(inputs, 1, tmp_path, "engine.avar.alhpa=0.1")
    assert unknown.returncode == 2 and "alhpa" in unknown.stderr and len(unknown.stderr.splitlines()) == 1
    rows = pd.read_parquet(inputs / "sft.parquet")
    rows["messages"] = [
        [m | {"role": "narrator" if m["role"] == "user" else m["role"]} for m in row] for row in rows.messages
    ]
    rows.to_parquet(inputs / "wrong.parquet")
    wrong = train(inputs, 1, tmp_path, f"data.train_files={inputs / 'wrong.parquet'}")
    assert wrong.returncode == 2 and "narrator" in wrong.stderr and len(wrong.stderr.splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_sigterm_ends_all_ranks_after_one_step_with_a_checkpoint_of_it(inputs):
    out = inputs / "stopped"
    never = ["trainer.save_freq=1000"]
    with open(inputs / "stopped.log", "wb") as log:
        run = subprocess.Popen(
            [*command(inputs, 1000, out, ranks=2), *never], stdout=log, stderr=log, env=ENVIRONMENT, cwd=inputs
        )
        try:
            limit = time.monotonic() + 200
            while not read_steps(out / "metrics.jsonl"):
                assert run.poll() is None and time.monotonic() < limit, (inputs / "stopped.log").read_text()[-3000:]
                time.sleep(0.2)
            run.terminate()  # torchrun hands it to its ranks
            assert run.wait(60) != 0
        finally:
            run.kill()
    steps = [step["step"] for step in read_steps(out / "metrics.jsonl")]
    assert latest_step(out) == steps[-1] and fault(out / f"global_step_{steps[-1]}") is None
    said = (inputs / "stopped.log").read_text()
    assert said.count(f"stopped: a checkpoint of step {steps[-1]} is saved") == 2, said[-3000:]
