"""Naive masses and biased attention, by the full T×T map. The oracle of every fast path; not for use beyond tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from verl_avar.roles import Role


def attention_map(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    key_mask: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention weights A [B, H, T, S] of query [B, H, T, D] and key [B, H_kv, S, D]; queries align bottom right.

    key_mask: bool [B, S], False at padding. segments: int [B, T], tokens attend within their own (packed inputs).
    bias: [B, S], added to the logits. A query that sees no key gets zeros.
    """
    heads, t, s = query.shape[1], query.shape[2], key.shape[2]
    key = key.repeat_interleave(heads // key.shape[1], dim=1)
    logits = query @ key.transpose(-1, -2) * (scale if scale is not None else query.shape[-1] ** -0.5)
    visible = torch.ones(1, 1, t, s, dtype=torch.bool, device=query.device)
    if causal:
        visible = visible.tril(diagonal=s - t)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :].bool()
    if segments is not None:
        visible = visible & (segments[:, None, :, None] == segments[:, None, None, :])
    if bias is not None:
        logits = logits + bias[:, None, None, :].to(logits.dtype)
    weights = logits.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    return torch.where(visible.any(dim=-1, keepdim=True), weights, torch.zeros_like(weights))


def role_mass(weights: torch.Tensor, roles: torch.Tensor, of: Sequence[Role]) -> torch.Tensor:
    """Masses [B, H, T, R] of the roles `of`, from attention weights [B, H, T, S] and roles uint8 [B, S]."""
    return torch.stack([(weights * (roles == role)[:, None, None, :]).sum(-1) for role in of], dim=-1)
