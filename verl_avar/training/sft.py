"""Cold-start SFT (AVAR §3.2) through verl's SFT trainer, in one process, under torchrun or on Ray.

python -m verl_avar.training.sft [--config-name sft_cpu] key=value …      settings: training/config/sft.yaml

Resumes from the newest checkpoint of `trainer.default_local_dir`. Each checkpoint holds `huggingface/`, a model folder
for transformers and vLLM (`checkpoint.latest_model`).
"""

from __future__ import annotations

import sys

from omegaconf import DictConfig, OmegaConf

from verl_avar.errors import ConfigError
from verl_avar.training import command
from verl_avar.training.environment import single_process_group
from verl_avar.training.metrics import log_to_unless_told
from verl_avar.training.stopping import on_sigterm


def run(config: DictConfig) -> None:
    """Trains. Raises ConfigError for a mistake in the settings or the data, Stopped after SIGTERM."""
    from verl_avar.training.checks import check_files, check_model, check_objective, check_roles
    from verl_avar.training.schema import check_sft

    check_objective(config)
    check_model(config.model.path)
    check_files(config.data.train_files, columns=[config.data.messages_key, "images"], mixed=True)
    check_roles(config.data.train_files, config.data.messages_key)
    check_sft(config)

    from verl_avar.training.whole_checkpoints import before_resuming  # it imports verl, which has much to say

    before_resuming(config.trainer)
    log_to_unless_told(config.avar.metrics_file)
    (run_on_ray if config.avar.ray else run_here)(config)


def run_here(config: DictConfig) -> None:
    """In this process, or in each of torchrun's."""
    try:
        single_process_group()
    except RuntimeError as error:  # the port that the user fixed
        raise ConfigError(str(error)) from error
    from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group

    from verl_avar.training.sft_trainer import AvarSFTTrainer

    initialize_global_process_group()
    try:
        fit(AvarSFTTrainer(config=config))
    finally:
        destroy_global_process_group()


def run_on_ray(config: DictConfig) -> None:
    """On a Ray cluster of its own, or one that runs already."""
    import ray

    from verl_avar.training.cluster import prepare_ray

    prepare_ray(config)
    from verl_avar.training.sft_trainer import AvarRaySFTTrainer

    ray.init(**OmegaConf.to_container(config.ray_kwargs.ray_init, resolve=True))
    try:
        fit(AvarRaySFTTrainer(config=config))
    finally:
        ray.shutdown()


def fit(trainer) -> None:
    """Trains, and ends on SIGTERM with a checkpoint."""

    def ask() -> None:
        trainer.stop_requested = True

    on_sigterm(ask)
    trainer.fit()


def main(argv: list[str] | None = None) -> int:
    """Command line; see `command.py`."""
    return command.main("sft", run, argv)


if __name__ == "__main__":
    sys.exit(main())
