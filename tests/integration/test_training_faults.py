"""RL runs whose processes die, whose disk is full, whose checkpoint is broken, or that are asked to stop.

Each case harms the run that the one before it left, so that every start is a resumption too.
"""

import os
import signal
from pathlib import Path

import pytest
from training_runs import Run

from verl_avar.training.checkpoint import latest_step
from verl_avar.training.stopping import EXIT_STOPPED
from verl_avar.training.whole_checkpoints import fault

TWO_MINUTES = 120
pytestmark = pytest.mark.timeout(420)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from verl_avar.compat import torchvision_ops

    torchvision_ops.apply()
    from verl_avar.miniature.data import write_rl
    from verl_avar.miniature.model import build_model, build_processor, save
    from verl_avar.miniature.tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("faults")
    tokenizer = build_tokenizer(samples=500)
    save(folder / "model", build_model(tokenizer), build_processor(tokenizer))
    write_rl(folder / "rl.parquet", 64, seed=0)
    return folder


def settings(folder: Path) -> dict:
    return {
        "actor_rollout_ref.model.path": folder / "model",
        "data.train_files": folder / "rl.parquet",
        "data.train_batch_size": 4,
        "data.max_response_length": 16,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 4,
        "actor_rollout_ref.rollout.n": 4,
        "trainer.default_local_dir": folder / "checkpoints",
        "trainer.total_training_steps": 200,
        "trainer.save_freq": 2,
    }


def harmed(folder: Path, name: str, harm) -> Run:
    """A run that went on for three steps or more, at least one beyond its newest checkpoint, and was then harmed."""
    begins = latest_step(folder / "checkpoints")
    with Run(folder, settings(folder), name) as run:
        run.until(lambda: run.steps() and run.steps()[-1] >= begins + 3)
        assert run.steps()[0] == begins + 1, "nothing is lost but the steps since the checkpoint"
        harm(run)
        run.status = run.until_end(TWO_MINUTES)
        assert run.alive() == []
    newest = folder / "checkpoints" / f"global_step_{latest_step(folder / 'checkpoints')}"
    assert latest_step(folder / "checkpoints") >= begins + 2 and fault(newest) is None
    return run


def whole_checkpoints(folder: Path) -> list[int]:
    found = {int(path.name.split("_")[-1]): path for path in (folder / "checkpoints").glob("global_step_*[0-9]")}
    return [step for step, path in found.items() if fault(path) is None]


def test_sigterm_saves_and_stops(folder):
    run = harmed(folder, "sigterm", lambda run: run.process.terminate())
    assert run.status == EXIT_STOPPED
    assert latest_step(folder / "checkpoints") == run.steps()[-1]
    assert f"a checkpoint of step {run.steps()[-1]} is saved" in run.last_line()


def test_a_killed_driver_leaves_nothing_running(folder):
    assert harmed(folder, "driver", lambda run: run.process.kill()).status == -signal.SIGKILL


@pytest.mark.parametrize("victim", ["ray::vLLMHttpServer", "VLLM::EngineCore", "ray::WorkerDict"])
def test_a_dead_process_ends_the_run_with_its_name(folder, victim):
    run = harmed(folder, victim.split(":")[-1], lambda run: run.kill(victim))
    assert run.status in (1, 3)
    assert run.last_line().startswith("error: ") and "resumes from the newest checkpoint" in run.last_line()


def test_a_full_disk_is_named_and_the_checkpoint_before_stays(folder):
    begins = latest_step(folder / "checkpoints")
    full = folder / "checkpoints" / f"global_step_{begins + 2}" / "actor" / "model_world_size_1_rank_0.pt"
    full.parent.mkdir(parents=True)
    full.symlink_to("/dev/full")  # every write fails as on a full disk
    with Run(folder, settings(folder), "full") as run:
        assert run.until_end(240) == 1
        assert run.alive() == []
    assert f"the checkpoint of step {begins + 2} could not be written to" in run.last_line()
    assert latest_step(folder / "checkpoints") == begins
    full.unlink()


def test_a_truncated_checkpoint_is_passed_over_and_the_run_ends_well(folder):
    newest = latest_step(folder / "checkpoints")
    before = max(step for step in whole_checkpoints(folder) if step < newest)
    weights = folder / "checkpoints" / f"global_step_{newest}" / "actor" / "model_world_size_1_rank_0.pt"
    os.truncate(weights, weights.stat().st_size // 2)
    with Run(folder, settings(folder) | {"trainer.total_training_steps": newest + 1}, "truncated") as run:
        assert run.until_end(240) == 0, run.said()[-5000:]
        assert run.alive() == []
    assert f"resumes from step {before}" in run.said()
    assert run.steps()[0] == before + 1 and run.steps()[-1] == newest + 1
    assert (folder / "checkpoints" / f"global_step_{newest}.broken").is_dir()
