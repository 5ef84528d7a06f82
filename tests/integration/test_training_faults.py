"""RL runs whose processes die, whose disk is full, whose checkpoint is broken: two at a time, each resumed once.

Two runs on one machine also share what verl does not keep apart (compat/verl_weight_socket.py).

What SIGTERM does is tested in test_recipe.py.
"""

import os
import signal
from pathlib import Path

import pytest
from training_runs import Run

from verl_avar.training.checkpoint import latest_step
from verl_avar.training.whole_checkpoints import fault

TWO_MINUTES = 120
pytestmark = pytest.mark.timeout(900)


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


def settings(folder: Path, name: str) -> dict:
    return {
        "actor_rollout_ref.model.path": folder / "model",
        "data.train_files": folder / "rl.parquet",
        "data.train_batch_size": 4,
        "data.max_response_length": 16,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 4,
        "actor_rollout_ref.rollout.n": 4,
        "trainer.default_local_dir": folder / name,
        "trainer.total_training_steps": 200,
        "trainer.save_freq": 2,
        "ray_kwargs.ray_init.address": "local",
    }


def newest(checkpoints: Path) -> int:
    """Step of the newest checkpoint, which is whole."""
    step = latest_step(checkpoints)
    assert step == 0 or fault(checkpoints / f"global_step_{step}") is None
    return step


def harm(run: Run, act) -> int:
    """After three steps, when the newest checkpoint is one or two of them old. Returns the exit status."""
    run.until(lambda: len(run.steps()) >= 3)
    act()
    status = run.until_end(TWO_MINUTES)
    assert run.alive() == []
    return status


def test_a_dead_process_ends_a_run_with_a_reason_and_leaves_a_whole_checkpoint(folder):
    victims = {"server": ("ray::vLLMHttpServer", "rollouts of"), "worker": ("ray::WorkerDict", "WorkerDict")}
    with (
        Run(folder, settings(folder, "server"), "server-1") as server,
        Run(folder, settings(folder, "worker"), "worker-1") as worker,
    ):
        for run, (victim, reason) in zip((server, worker), victims.values(), strict=True):
            assert harm(run, lambda run=run, victim=victim: run.kill(victim)) in (1, 3)
            assert run.last_line().startswith("error: ") and reason in run.last_line()
            assert run.last_line().endswith("The same command resumes from the newest checkpoint")
    assert newest(folder / "server") >= 2 and newest(folder / "worker") >= 2


def test_a_resumed_run_passes_over_what_is_broken_and_names_a_full_disk(folder):
    """One resumes from the checkpoint before the truncated one, and its driver is killed; the other can't save."""
    broken, before = newest(folder / "server"), newest(folder / "worker")
    older = max([s for s in range(1, broken) if (folder / "server" / f"global_step_{s}").exists()], default=0)
    os.truncate(weights(folder / "server", broken), weights(folder / "server", broken).stat().st_size // 2)
    full = weights(folder / "worker", before + 2)
    full.parent.mkdir(parents=True)
    full.symlink_to("/dev/full")  # every write fails as on a full disk
    with (
        Run(folder, settings(folder, "server"), "server-2") as killed,
        Run(folder, settings(folder, "worker"), "worker-2") as unsaved,
    ):
        assert unsaved.until_end(480) == 1 and unsaved.alive() == []
        assert harm(killed, killed.process.kill) == -signal.SIGKILL
    assert unsaved.steps()[0] == before + 1
    assert f"the checkpoint of step {before + 2} could not be written to" in unsaved.last_line()
    assert newest(folder / "worker") == before
    assert killed.steps()[0] == older + 1
    assert (f"resumes from step {older}" if older else "the run begins again") in killed.said()
    assert (folder / "server" / f"global_step_{broken}.broken").is_dir()
    assert newest(folder / "server") >= older + 2


def weights(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"global_step_{step}" / "actor" / "model_world_size_1_rank_0.pt"
