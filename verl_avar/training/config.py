"""The objective's settings, as a block `avar` of verl's FSDP engine config.

    engine._target_=verl_avar.training.config.AvarFSDPEngineConfig +engine.avar.alpha=0.15            (SFT)
    actor_rollout_ref.actor.fsdp_config._target_=… +actor_rollout_ref.actor.fsdp_config.avar.alpha=…  (RL)

verl builds engine configs through their `_target_`, so the block needs no change upstream; `training/config/*.yaml`
set it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from verl.workers.config import FSDPEngineConfig

from verl_avar.roles import SCOPES

PASSES = ("always", "infer", "train", "objective")


@dataclass(frozen=True)
class AvarConfig:
    """Settings of AGTO (AVAR §3.2) and of what the engine measures. Raises ValueError for a bad one."""

    alpha: float = 0.0  # weight of L_enhance; the paper's cold-start: 0.15
    beta: float = 0.0  # weight of L_suppress; the paper's cold-start: 0.15
    eps: float = 1e-6
    queries: str = "response"  # Q: "response", "user" or "user+response"
    layers: str | list[int] = "all"  # text layers of the objective and of the masses
    system_floor: float | None = None  # a query-averaged system mass below this is not suppressed further
    masses: str = "always"  # passes that measure masses: "always", "infer" (no gradient), "train", "objective"
    warmup_steps: int = 0  # alpha and beta rise linearly over the first steps and are whole at the last of these
    decay_steps: int | None = None  # after the warm-up they fall linearly to 0 over so many steps; null: they stay

    def __post_init__(self):
        for name in ("alpha", "beta"):
            _require(_is_number(getattr(self, name)) and getattr(self, name) >= 0, name, self, "a number >= 0")
        _require(_is_number(self.eps) and self.eps > 0, "eps", self, "a number > 0")
        _require(self.queries in SCOPES, "queries", self, f"one of {', '.join(SCOPES)}")
        _require(self.masses in PASSES, "masses", self, f"one of {', '.join(PASSES)}")
        _require(_is_count(self.warmup_steps, 0), "warmup_steps", self, "a number of steps >= 0")
        ok = self.decay_steps is None or _is_count(self.decay_steps, 1)
        _require(ok, "decay_steps", self, "null or a number of steps >= 1")
        floor = self.system_floor
        ok = floor is None or (_is_number(floor) and 0 < floor < 1)
        _require(ok, "system_floor", self, "null or a mass between 0 and 1")
        if self.layers != "all":
            layers = None if isinstance(self.layers, str) else list(self.layers)
            ok = layers and all(isinstance(layer, int) and layer >= 0 for layer in layers)
            _require(bool(ok), "layers", self, 'all or a list of layer indices, such as "[0,1]"')
            object.__setattr__(self, "layers", sorted(set(layers)))

    @classmethod
    def of(cls, block: AvarConfig | Mapping[str, Any] | None) -> AvarConfig:
        """From a config block. Raises ValueError for a key that doesn't exist.

        None, as verl's own engine configs have it (the reference policy's), measures nothing.
        """
        if isinstance(block, cls):
            return block
        if block is None:
            return cls(masses="objective")
        block = dict(block)
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(block) - set(known)):
            raise ValueError(f"avar: unknown key {', '.join(unknown)}; the keys are {', '.join(known)}")
        return cls(**block)

    def at(self, step: int) -> AvarConfig:
        """The settings of one step, its coefficients scaled by the schedule and the schedule taken out.

        step: steps done before it, as verl's learning-rate schedule counts them: optimizer steps in SFT, updates of the
        actor in RL.
        """
        factor = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.decay_steps is not None:
            factor *= min(1.0, max(0.0, 1.0 - (step - self.warmup_steps) / self.decay_steps))
        return replace(self, alpha=factor * self.alpha, beta=factor * self.beta, warmup_steps=0, decay_steps=None)

    @property
    def active(self) -> bool:
        """Whether there is an objective."""
        return self.alpha > 0 or self.beta > 0

    def measures(self, training: bool) -> bool:
        """Whether a pass computes masses."""
        if training and self.active:
            return True
        return self.masses in (("always", "train") if training else ("always", "infer"))

    @property
    def layer_list(self) -> list[int] | None:
        """Layers for `probe`: None is all."""
        return None if self.layers == "all" else list(self.layers)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _require(ok: bool, name: str, config: AvarConfig, wanted: str) -> None:
    if not ok:
        raise ValueError(f"avar.{name}: got {getattr(config, name)!r}, wanted {wanted}")


@dataclass
class AvarFSDPEngineConfig(FSDPEngineConfig):
    """verl's FSDP engine config with the block `avar`."""

    _mutable_fields = FSDPEngineConfig._mutable_fields | {"avar"}

    avar: Any = None

    def __post_init__(self):
        super().__post_init__()
        self.avar = AvarConfig.of(self.avar)
