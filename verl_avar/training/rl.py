"""GRPO with visual-anchored rewards (AVAR §3.3) through verl's V1 trainer, `verl.trainer.main_ppo`.

python -m verl_avar.training.rl [--config-name rl_cpu] key=value …      settings: training/config/rl.yaml

Resumes from the newest checkpoint of `trainer.default_local_dir` (`trainer.resume_mode=auto`).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from omegaconf import DictConfig

from verl_avar.errors import ConfigError
from verl_avar.training import command
from verl_avar.training.cluster import prepare_ray
from verl_avar.training.metrics import log_to_unless_told
from verl_avar.training.shared_memory import remove_segments
from verl_avar.training.stopping import on_sigterm, request
from verl_avar.training.watchdog import watch


def run(config: DictConfig) -> None:
    """Trains until `trainer.total_training_steps`, on a Ray cluster of its own or one that runs already.

    Raises ConfigError for a mistake in the settings or the data, Stopped after SIGTERM, and what verl raises. A run
    that hangs, or has lost one of its processes, ends this process (`watchdog.py`).
    """
    check(config)
    log_to_unless_told(config.avar.metrics_file)
    prepare_ray(config)

    import ray
    from verl.trainer.main_ppo import TaskRunnerV1, run_ppo

    from verl_avar.training.lost_actors import LostActors
    from verl_avar.training.whole_checkpoints import before_resuming

    before_resuming(config.trainer)
    stop = request(config.trainer.default_local_dir)
    stop.unlink(missing_ok=True)  # of an earlier run

    def start(*args, **kwargs):  # run_ppo calls it when ray.init has set its own handler
        stop.parent.mkdir(parents=True, exist_ok=True)
        on_sigterm(stop.touch)
        return TaskRunnerV1.remote(*args, **kwargs)

    started = time.time()
    places = [config.trainer.default_local_dir, os.environ["VERL_FILE_LOGGER_PATH"]]
    try:
        with watch(places, config.avar.stall_s, [LostActors()]):
            run_ppo(config, task_runner_class=SimpleNamespace(remote=start))
    finally:
        ray.shutdown()
        remove_segments(since=started)
        stop.unlink(missing_ok=True)


def check(config: DictConfig) -> None:
    """Finds what is wrong with the settings and the data before Ray starts; makes the reward's path absolute."""
    from verl_avar.training.checks import check_files, check_model, check_objective, check_roles, check_visual_reward
    from verl_avar.training.schema import check_rl

    check_objective(config)
    check_visual_reward(config)
    check_model(config.actor_rollout_ref.model.path)
    columns = [config.data.prompt_key, "data_source", "reward_model", config.data.image_key]
    check_files(config.data.train_files, columns, config.data.image_key)
    check_roles(config.data.train_files, config.data.prompt_key)
    if config.trainer.test_freq > 0 or config.trainer.val_before_train:
        check_files(config.data.val_files, columns, config.data.image_key)
    config.reward.custom_reward_function.path = str(find_reward(config.reward.custom_reward_function.path))

    check_rl(config)


def find_reward(path: str) -> Path:
    """A reward file: as given, or under the repository this package is installed from."""
    for folder in (Path.cwd(), Path(__file__).parents[2]):
        if (found := folder / Path(path).expanduser()).is_file():
            return found
    raise ConfigError(f"reward.custom_reward_function.path: no file {path}")


def main(argv: list[str] | None = None) -> int:
    """Command line; see `command.py`."""
    return command.main("rl", run, argv)


if __name__ == "__main__":
    sys.exit(main())
