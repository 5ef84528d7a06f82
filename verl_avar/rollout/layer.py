"""What a layer of every attention backend shares: its link to the slots, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import AttentionType

from verl_avar.rollout.slots import SlotState


@dataclass
class LayerSlots:
    """One layer's link to its rank's slots, given by the connector once the KV cache exists.

    masses: float32 [max_tokens, H, 2] (visual, system), where the layer leaves those of the step's queries; None for a
    layer that is not probed. last: the step's scores are complete once this layer has written its masses.
    """

    state: SlotState
    masses: torch.Tensor | None
    last: bool


class LinkedAttention:
    """What the attention implementations of all our backends are. slots: None until `link_layers`."""

    slots: LayerSlots | None = None


def link_layers(impls: list[LinkedAttention], state: SlotState, probed: list[int]) -> None:
    """Gives each attention implementation, in the model's order, its `LayerSlots`. probed: ascending layer numbers."""
    for number, impl in enumerate(impls):
        masses = state.masses[probed.index(number)] if number in probed else None
        impl.slots = LayerSlots(state, masses, last=number == probed[-1])


def unlinked() -> RuntimeError:
    """The error of a layer that runs without its link."""
    return RuntimeError("verl_avar.rollout: a layer ran before the connector had registered its KV cache")


def refuse(attn_type: str, kv_cache_dtype: str, **features) -> None:
    """Raises NotImplementedError naming each of a layer's `features` that is set (neither None nor False)."""
    features |= {
        f"attention type {attn_type}": attn_type != AttentionType.DECODER,
        f"KV cache of type {kv_cache_dtype}": kv_cache_dtype not in ("auto", "float32", "bfloat16", "float16"),
    }
    asked = [name for name, value in features.items() if value is not None and value is not False]
    if asked:
        raise NotImplementedError(
            f"verl_avar.rollout: this model's attention uses {', '.join(asked)}, which the visual-attention backend "
            "does not support; run this model without its kv_transfer_config"
        )
