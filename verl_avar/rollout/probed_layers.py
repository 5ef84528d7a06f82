"""The layers whose attention is scored: an option of the engine, in its connector's extra config."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from verl_avar.rollout.options import LAYERS_KEY


def check_layers(layers: Sequence[int] | None) -> None:
    """Raises ValueError unless layers is None (all) or a list of different numbers from 0 on."""
    if layers is None:
        return
    numbers = isinstance(layers, Sequence) and not isinstance(layers, str) and len(layers) > 0
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in layers):
        raise ValueError(
            f"{LAYERS_KEY} must be a list of layer numbers from 0 on (or null for all), got {reprlib.repr(layers)}"
        )
    if len(set(layers)) < len(layers):
        raise ValueError(f"{LAYERS_KEY} names a layer twice: {reprlib.repr(list(layers))}")


def probed_layers(extra_config: Mapping[str, Any], count: int) -> list[int]:
    """The layers whose attention is scored, ascending, of a model with `count` layers.

    Raises ValueError for a layer that the model doesn't have (see also `check_layers`).
    """
    layers = extra_config.get(LAYERS_KEY)
    check_layers(layers)
    if layers is None:
        return list(range(count))
    if max(layers) >= count:
        raise ValueError(f"{LAYERS_KEY}: the model has layers 0 to {count - 1}, not {max(layers)}")
    return sorted(layers)
