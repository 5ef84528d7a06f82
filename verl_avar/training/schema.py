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

from verl_avar.training.compose import ConfigError

SFT_PARTS = ("engine", "optim", "checkpoint", "profiler")  # those that verl/trainer/sft_trainer.py:_build_config builds
RL_PARTS = ("actor_rollout_ref.rollout", "algorithm")  # validate_config builds the actor


def check_sft(config: DictConfig) -> None:
    """Raises ConfigError for what verl's SFT trainer would refuse."""
    with _one_line():
        _check_parts(config, SFT_PARTS, model="model")
        ranks = config.trainer.nnodes * config.trainer.n_gpus_per_node
        if config.data.train_batch_size % ranks:
            raise ConfigError(f"data.train_batch_size={config.data.train_batch_size} does not divide by {ranks} GPUs")


def check_rl(config: DictConfig) -> None:
    """Raises ConfigError for what verl's RL trainer would refuse."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    with _one_line():
        _check_parts(config, RL_PARTS, model="actor_rollout_ref.model")
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # it says that all is well
            warnings.simplefilter("ignore")
            validate_config(config, need_reference_policy(config), need_critic(config))


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
