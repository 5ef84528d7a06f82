"""The block `avar` of verl's Megatron engine config, set by `training/config/*_megatron.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from verl.workers.config import McoreEngineConfig

from verl_avar.training.config import AvarConfig


@dataclass
class AvarMcoreEngineConfig(McoreEngineConfig):
    """verl's Megatron engine config with the block `avar`. Raises ValueError for context and pipeline parallelism."""

    _mutable_fields = McoreEngineConfig._mutable_fields | {"avar"}

    avar: Any = None

    def __post_init__(self):
        super().__post_init__()
        self.avar = AvarConfig.of(self.avar)
        check_parallelism(self)


def check_parallelism(config: McoreEngineConfig) -> None:
    """Raises ValueError for settings of a Megatron engine under which masses or gradients would not be exact."""
    pipeline = "the backward pass of one micro-batch follows the forward pass of another there"
    for name, limit, why in (
        ("context_parallel_size", 1, "a rank sees a part of each sequence there"),
        ("dynamic_context_parallel", False, "a rank sees a part of each sequence there"),
        ("pipeline_model_parallel_size", 1, pipeline),
        ("virtual_pipeline_model_parallel_size", 1, pipeline),
    ):
        if (getattr(config, name) or limit) > limit:
            raise ValueError(f"the AVAR engine wants {name}={limit}: {why}; use tensor_model_parallel_size")
