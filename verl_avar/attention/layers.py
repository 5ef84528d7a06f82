"""Which attention layers of a model look at something else than its sequence."""

from __future__ import annotations

from torch import nn

# Llama-3.2-Vision puts the image into layers of their own: their keys are vision states, not tokens of the sequence.
CROSS_ATTENTION = frozenset({"MllamaTextCrossAttention"})


def cross_attends(module: nn.Module) -> bool:
    """Whether all keys of this attention module are vision states."""
    return type(module).__name__ in CROSS_ATTENTION
