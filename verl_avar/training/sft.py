"""Cold-start SFT (METHOD §4) through verl's SFT trainer, in one process, under torchrun or on Ray.

python -m verl_avar.training.sft [--config-name sft_cpu] key=value …      settings: training/config/sft.yaml

Resumes from the newest checkpoint of `trainer.default_local_dir`. Each checkpoint holds `huggingface/`, a model folder
for transformers and vLLM (`checkpoint.latest_model`).
"""

from __future__ import annotations

import sys
from functools import partial

from omegaconf import DictConfig

from verl_avar.training.compose import ConfigError, arguments, compose
from verl_avar.training.environment import prepare, single_process_group


def run(config: DictConfig, ray: bool = False) -> None:
    """Trains. ray: through Ray workers (`trainer.nnodes` x `trainer.n_gpus_per_node`) instead of this process."""
    from verl_avar.training.checks import check_files, check_model
    from verl_avar.training.config import AvarConfig

    AvarConfig.of(config.engine.get("avar"))
    check_model(config.model.path)
    check_files(config.data.train_files, columns=[config.data.messages_key, "images"])
    (run_ray if ray else run_here)(config)


def run_here(config: DictConfig) -> None:
    """In this process, or in each of torchrun's."""
    single_process_group()
    from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group

    from verl_avar.training.sft_trainer import AvarSFTTrainer

    initialize_global_process_group()
    try:
        AvarSFTTrainer(config=config).fit()
    finally:
        destroy_global_process_group()


def run_ray(config: DictConfig) -> None:
    """On the Ray cluster of RAY_ADDRESS, or a local one that ends with the run."""
    import ray

    from verl_avar.training.sft_trainer import AvarRaySFTTrainer

    ray.init(num_gpus=config.trainer.n_gpus_per_node if config.trainer.device == "cpu" else None)
    try:
        AvarRaySFTTrainer(config=config).fit()
    finally:
        ray.shutdown()


def main(argv: list[str] | None = None, ray: bool = False) -> int:
    """Command line. 2 for a mistake in the settings, told in one line."""
    try:
        config = compose(*arguments("verl_avar.training.sft", "sft", argv))
        prepare(cpu=config.trainer.device == "cpu")
        run(config, ray=ray)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


main_ray = partial(main, ray=True)

if __name__ == "__main__":
    sys.exit(main())
