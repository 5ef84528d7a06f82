"""A composed configuration against verl's own dataclasses and checks, without a GPU, a model or data.

hydra's struct mode finds unknown keys; verl's dataclasses find keys and values that their parts refuse. Parts that verl
builds only together with a model (`HFModelConfig` loads the tokenizer) are checked for names and types alone.
"""

from __future__ import annotations

import contextlib
import io
import warnings

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl_avar.errors import ConfigError
from verl_avar.training.checks import engine_of

SFT_PARTS = ("engine", "optim", "checkpoint", "profiler")  # those that verl/trainer/sft_trainer.py:_build_config builds
RL_PARTS = ("actor_rollout_ref.rollout", "algorithm")  # validate_config builds the actor


def check_sft(config: DictConfig) -> None:
    """Raises ConfigError for what verl's SFT trainer would refuse."""
    with _one_line():
        _check_parts(config, SFT_PARTS, model="model")
        gpus = config.trainer.nnodes * config.trainer.n_gpus_per_node
        ranks, data = _data_parallel(gpus, config.engine, "engine"), config.data
        if data.train_batch_size % ranks:
            raise ConfigError(
                f"data.train_batch_size={data.train_batch_size} does not divide by {ranks} data-parallel ranks"
            )
        if not data.use_dynamic_bsz and data.train_batch_size // ranks % data.micro_batch_size_per_gpu:
            raise ConfigError(
                f"data.micro_batch_size_per_gpu={data.micro_batch_size_per_gpu} does not divide a rank's part of the "
                f"batch, {data.train_batch_size // ranks}"
            )


def check_rl(config: DictConfig) -> None:
    """Raises ConfigError for what verl's RL trainer would refuse."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    with _one_line():
        _check_parts(config, RL_PARTS, model="actor_rollout_ref.model")
        engine = engine_of(config)
        _data_parallel(config.trainer.nnodes * config.trainer.n_gpus_per_node, engine.block, engine.key)
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # it says that all is well
            warnings.simplefilter("ignore")
            validate_config(config, need_reference_policy(config), need_critic(config))


def _data_parallel(gpus: int, engine: DictConfig, key: str) -> int:
    """Data-parallel ranks. Raises ConfigError where tensor-parallel groups don't fill the GPUs."""
    tensor = engine.get("tensor_model_parallel_size", 1)
    if gpus % tensor:
        raise ConfigError(f"{key}.tensor_model_parallel_size={tensor} does not divide {gpus} GPUs")
    return gpus // tensor


def _check_parts(config: DictConfig, parts: tuple[str, ...], model: str) -> None:
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config import HFModelConfig

    OmegaConf.merge(OmegaConf.structured(HFModelConfig), OmegaConf.select(config, model))
    for part in parts:
        omega_conf_to_dataclass(OmegaConf.select(config, part))


@contextlib.contextmanager
def _one_line():
    """verl's own objections, of several types, as ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, AssertionError, ValueError, TypeError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
