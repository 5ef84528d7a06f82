"""RL runs whose processes die, whose disk is full, whose checkpoint is broken.

Each case harms the run that the one before it left, so that every start is a resumption too. What SIGTERM does is
tested in test_recipe.py.
"""

import os
import signal
from pathlib import Path

import pytest
from training_runs import Run

from verl_avar.training.checkpoint import latest_step
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


def harmed(folder: Path, name: str, harm, resumes_from: int) -> Run:
    """A run that was harmed after three steps, when its newest checkpoint is one or two steps old, and has ended."""
    with Run(folder, settings(folder), name) as run:
        run.until(lambda: len(run.steps()) >= 3)
        assert run.steps()[0] == resumes_from + 1, "nothing is lost but the steps since the checkpoint"
        harm(run)
        run.status = run.until_end(TWO_MINUTES)
        assert run.alive() == []
    assert newest(folder) >= resumes_from + 2
    return run


def newest(folder: Path) -> int:
    """Step of the newest checkpoint, which is whole."""
    step = latest_step(folder / "checkpoints")
    assert step == 0 or fault(folder / "checkpoints" / f"global_step_{step}") is None
    return step


@pytest.mark.parametrize("victim", ["ray::vLLMHttpServer", "ray::WorkerDict"])
def test_a_dead_process_ends_the_run_with_a_reason(folder, victim):
    run = harmed(folder, victim.split(":")[-1], lambda run: run.kill(victim), newest(folder))
    assert run.status in (1, 3)
    reason = {"ray::vLLMHttpServer": "rollouts of", "ray::WorkerDict": "WorkerDict"}[victim]
    assert run.last_line().startswith("error: ") and reason in run.last_line()
    assert run.last_line().endswith("The same command resumes from the newest checkpoint")


def test_a_truncated_checkpoint_is_passed_over_and_a_killed_driver_leaves_nothing_running(folder):
    broken = newest(folder)
    weights = folder / "checkpoints" / f"global_step_{broken}" / "actor" / "model_world_size_1_rank_0.pt"
    os.truncate(weights, weights.stat().st_size // 2)
    run = harmed(folder, "driver", lambda run: run.process.kill(), broken - 2)
    assert run.status == -signal.SIGKILL
    assert f"resumes from step {broken - 2}" in run.said()
    assert (folder / "checkpoints" / f"global_step_{broken}.broken").is_dir()


def test_a_full_disk_is_named_and_the_checkpoint_before_stays(folder):
    before = newest(folder)
    full = folder / "checkpoints" / f"global_step_{before + 2}" / "actor" / "model_world_size_1_rank_0.pt"
    full.parent.mkdir(parents=True)
    full.symlink_to("/dev/full")  # every write fails as on a full disk
    with Run(folder, settings(folder), "full") as run:
        assert run.until_end(240) == 1
        assert run.alive() == []
    assert f"the checkpoint of step {before + 2} could not be written to" in run.last_line()
    assert newest(folder) == before
