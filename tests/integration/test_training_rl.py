"""GRPO end to end on real verl, Ray and vLLM: two steps, the actor's number rewarded, and the rollout's beside it."""

import os
import subprocess
import sys

import pytest

from verl_avar.training.checkpoint import latest_model
from verl_avar.training.metrics import read_steps


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    from verl_avar.compat import torchvision_ops

    torchvision_ops.apply()
    from verl_avar.miniature.data import write_rl
    from verl_avar.miniature.model import build_model, build_processor, save
    from verl_avar.miniature.tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("rl")
    tokenizer = build_tokenizer(samples=500)
    save(folder / "model", build_model(tokenizer), build_processor(tokenizer))
    write_rl(folder / "rl.parquet", 16, seed=0)
    settings = {
        "actor_rollout_ref.model.path": folder / "model",
        "data.train_files": folder / "rl.parquet",
        "data.train_batch_size": 4,
        "data.max_response_length": 16,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 4,
        "actor_rollout_ref.actor.fsdp_config.avar.masses": "always",
        "actor_rollout_ref.rollout.n": 4,
        # Responses of one length, so that a mean over tokens is a mean over rollouts
        "actor_rollout_ref.rollout.ignore_eos": True,
        "trainer.default_local_dir": folder / "checkpoints",
        "trainer.total_training_steps": 2,
        "trainer.save_freq": 2,
        "avar.vars.source": "actor",
        # An untrained model answers wrongly: behind the gate the visual term would be 0
        "+reward.custom_reward_function.reward_kwargs.gate": False,
    }
    environment = {name: value for name, value in os.environ.items() if name != "VERL_FILE_LOGGER_PATH"}
    done = subprocess.run(
        [sys.executable, "-m", "verl_avar.training.rl", "--config-name", "rl_cpu"]
        + [f"{key}={value}" for key, value in settings.items()],
        capture_output=True,
        text=True,
        timeout=420,
        env=environment,
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return read_steps(folder / "checkpoints" / "metrics.jsonl"), latest_model(folder / "checkpoints")


def test_the_actors_number_is_rewarded_once(steps):
    metrics, _ = steps
    assert [step["step"] for step in metrics] == [1, 2]
    for step in metrics:
        assert step["reward/lambda_v"] == 0 and step["vars/actor"] > 0
        assert step["vars/reward"] == pytest.approx(0.3 * step["vars/actor"])
        parts = step["reward/acc"] + 0.3 * step["vars/actor"] + 0.1 * step["reward/format"]
        assert step["critic/score/mean"] == step["critic/rewards/mean"] == pytest.approx(parts, abs=1e-5)


def test_every_rollouts_number_is_the_actors(steps):
    for step in steps[0]:
        assert step["reward/visual_missing"] == 0
        assert step["vars/rollout"] == pytest.approx(step["reward/visual_raw"])
        assert 0 < step["vars/difference"] <= step["vars/difference_max"] < 1e-3


def test_rollout_and_actor_measure_the_same_attention(steps):
    for step in steps[0]:
        assert step["response_length/min"] == step["response_length/max"] == 16
        assert step["actor/attention/vas_response"] == pytest.approx(step["reward/visual_raw"], rel=1e-3)
        assert step["actor/attention/visual_mass"] == pytest.approx(step["reward/visual_mass"], abs=1e-4)
        assert step["actor/attention/system_mass"] == pytest.approx(step["reward/system_mass"], abs=1e-4)
        assert step["training/rollout_probs_diff_max"] < 1e-2


def test_checkpoint_loads_in_transformers(steps):
    from transformers import Qwen2_5_VLForConditionalGeneration

    _, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(steps[1], output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
