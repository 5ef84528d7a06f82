"""What a run on a Ray cluster that runs already needs beside its address.

Workers of a local Ray inherit the driver's environment; those of a cluster have their node's, and get the driver's
variables through Ray's runtime environment. Sizes are the cluster's own: `ray.init` refuses to be told them.
"""

from __future__ import annotations

import os

from omegaconf import DictConfig, OmegaConf, open_dict

from verl_avar.compat.verl_weight_socket import RUN
from verl_avar.training.environment import ANY_MACHINE, CPU_MACHINE

# Arguments of ray.init that describe a cluster of one's own.
OWN_CLUSTER = ("num_cpus", "num_gpus", "object_store_memory", "include_dashboard")
LOGGER_FILE = "VERL_FILE_LOGGER_PATH"  # the trainer that logs may run on another node than the driver


def is_attached(address: str | None) -> bool:
    """Whether `ray.init(address)` joins a cluster that runs already, as far as settings and RAY_ADDRESS say."""
    return address != "local" and bool(address or os.environ.get("RAY_ADDRESS"))


def prepare_ray(config: DictConfig) -> None:
    """Fits `ray_kwargs.ray_init` to the cluster that it names; what the user put into its env_vars wins."""
    init = config.ray_kwargs.ray_init
    if not is_attached(init.get("address")):
        return
    names = [*ANY_MACHINE, RUN, LOGGER_FILE, *(CPU_MACHINE if config.trainer.device == "cpu" else ())]
    ours = {name: os.environ[name] for name in names if name in os.environ}
    with open_dict(config):
        for name in OWN_CLUSTER:
            if name in init:
                init[name] = None
        init.runtime_env = OmegaConf.merge({"env_vars": ours}, init.get("runtime_env") or {})
