"""The masses that VAS is made of: every attention layer's own, and the definition for a model of cross-attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from verl_avar.attention.hf import Record
from verl_avar.attention.mass import MASS_ROLES
from verl_avar.roles import Role


def cross_attention_layers(model: nn.Module) -> frozenset[int]:
    """Layers by which images come in (Llama-3.2-Vision); empty where images are tokens of the sequence."""
    return frozenset(_gates(model))


def alone(model: nn.Module) -> bool:
    """Whether a row's numbers depend on its batch, so that rows have to be run one by one.

    transformers 5.10 lets the text before an image of Llama-3.2-Vision attend to every image slot of the batch, empty
    ones included (huggingface/transformers#39379).
    """
    return bool(_gates(model))


def masses(model: nn.Module, record: Record, of: Sequence[Role] = MASS_ROLES) -> tuple[torch.Tensor, list[int]]:
    """Masses of a pass of `model` under `probe` for VAS (AVAR §2.2, arXiv:2603.03825), and the layers they belong to.

    Returns float32 [L, B, H, T, R] with the roles `of`, which the probe was asked for, and L layer indices. Layers
    without an attention map (linear attention in Qwen3.5) are not among them.

    Llama-3.2-Vision sees its images in cross-attention layers, where a softmax over the image alone always sums to 1
    and a learned gate says how much of it enters the residual stream. There, for a cross-attention layer l:

        m_VISUAL[l, h, i] = |tanh(gate_l)| · mass on the vision keys (1 from the first image on, 0 before it)
        m_R[l, h, i]      = mean over self-attention layers and heads of m_R[i]         for every other role R

    and L are the cross-attention layers. Such a VAS compares checkpoints of this architecture with each other. It is
    not on the scale of models that attend to image tokens, and the paper's classes do not apply to it.
    Raises ValueError where a pass of such a model reported no cross-attention or no self-attention layer.
    """
    columns = torch.stack([record.mass(role) for role in of], dim=-1)
    gates, layers = _gates(model), record.layers
    if not gates:
        return columns, layers
    cross = [row for row, layer in enumerate(layers) if layer in gates]
    own = [row for row, layer in enumerate(layers) if layer not in gates]
    if not (cross and own):
        raise ValueError(
            f"masses: {type(model).__name__} wants cross-attention layers {sorted(gates)} and self-attention layers "
            f"together, layers {layers} reported; measure all layers, on a prompt with an image"
        )
    out = columns[own].mean(dim=(0, 2))[None, :, None].repeat(len(cross), 1, columns.shape[2], 1, 1)
    if Role.VISUAL in of:
        column = list(of).index(Role.VISUAL)
        gate = torch.stack([gates[layers[row]].detach().float().tanh().abs() for row in cross])[..., None, None]
        # transformers lets queries before an image see all of it, where the model was trained to see nothing.
        seen = (record.roles == Role.VISUAL).cumsum(dim=-1) > 0
        out[..., column] = gate.to(out.device) * columns[cross][..., column] * seen[None, :, None].to(out.device)
    return out, [layers[row] for row in cross]


def reach(model: nn.Module, roles: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
    """Whether each query's attention reaches back over the whole system turn: bool [L, B, T] for roles uint8 [B, T].

    False for the later queries of sliding-window layers: VAS has no denominator there. True without a system turn.
    Raises ValueError for layers that attend within chunks, which no tested family has.
    """
    text = model.config.get_text_config()
    window = getattr(text, "sliding_window", None)
    # As transformers makes its masks: without a kind for each layer all of them slide where there is a window.
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    position = torch.arange(roles.shape[1], device=roles.device)
    system = roles == Role.SYSTEM
    first = torch.where(system.any(-1), system.int().argmax(-1), roles.shape[1])  # [B]
    found = torch.ones(len(layers), *roles.shape, dtype=torch.bool, device=roles.device)
    for row, layer in enumerate(layers):
        if kinds[layer] == "chunked_attention":
            raise ValueError(f"reach: {model.config.model_type} attends within chunks, for which VAS is not defined")
        if window and kinds[layer] == "sliding_attention":
            found[row] = position - first[:, None] < window
    return found


def _gates(model: nn.Module) -> dict[int, torch.Tensor]:
    """The gate of each cross-attention layer, by layer index."""
    return {
        module.layer_idx: module.cross_attn_attn_gate
        for module in model.modules()
        if hasattr(module, "cross_attn_attn_gate")
    }
