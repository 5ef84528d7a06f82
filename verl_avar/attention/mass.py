"""Attention mass per role by the indicator identity.

`m_R[h, i] = Σ_{j in R} A[h, i, j] = (softmax(QKᵀ)·1_R)[h, i]`: masses are one more attention call whose value matrix
holds one 0/1 column per role. Any fused kernel computes it in O(T) memory, with exact gradients into Q and K.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from verl_avar.roles import Role

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

MASS_ROLES = (Role.VISUAL, Role.SYSTEM)
# Rows of a restricted query range that share one explicit causal mask: bounds that mask to _ROWS × T.
_ROWS = 512


def indicators(roles: torch.Tensor, of: Sequence[Role], like: torch.Tensor, width: int) -> torch.Tensor:
    """Value matrix of the identity: one 0/1 column per role of `of`, zeros up to `width`.

    roles: uint8 [B, S]; like: a key tensor [B, H_kv, S, D], gives shape and dtype. Returns [B, H_kv, S, width].
    """
    if len(of) > width:
        raise ValueError(f"role_mass: {len(of)} roles do not fit a head size of {width}")
    columns = torch.stack([roles == role for role in of], dim=-1).to(like.dtype)
    return F.pad(columns, (0, width - len(of)))[:, None].expand(-1, like.shape[1], -1, -1)


def output_and_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    roles: torch.Tensor,
    attend: Attend,
    of: Sequence[Role] = MASS_ROLES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention output and masses by one call: the indicators ride beside the values, eight columns wider.

    query: [B, H, T, D]; key, value: [B, H_kv, S, D]; roles: uint8 [B, S]. attend: the kernel, which takes that head
    size and whose scale does not come from it: (query, key, value) -> [B, H, T, D + 8]. Returns [B, H, T, D] and
    masses [B, H, T, R] in float32.
    """
    size, extra = value.shape[-1], -(-len(of) // 8) * 8  # kernels want multiples of 8
    columns = indicators(roles, of, key, extra)
    # The same head size for all three, which the fused kernels ask for; zeros add nothing to a logit.
    out = attend(F.pad(query, (0, extra)), F.pad(key, (0, extra)), torch.cat([value, columns], dim=-1))
    return out[..., :size], out[..., size : size + len(of)].float()


def role_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    roles: torch.Tensor,
    *,
    of: Sequence[Role] = MASS_ROLES,
    queries: tuple[int, int] | None = None,
    key_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    attend: Attend | None = None,
) -> torch.Tensor:
    """Attention mass that each query gives to each role of `of`.

    query: [B, H, T, D]; key: [B, H_kv, S, D] with H a multiple of H_kv (grouped queries), after rotary embedding;
    T < S aligns the queries with the last keys. roles: uint8 [B, S].
    queries: a range [start, stop) of query positions; only these rows are computed and returned.
    key_mask: bool [B, S], False at padding, which may be on either side. cu_seqlens: int [N+1], the borders of N
    sequences packed into one row (B = 1). scale: of the logits, 1/√D by default.
    attend: the kernel, `(query, key, value) -> [B, H, T, D]`, where the caller has its own (mask, packing and scale are
    then its business); by default torch's scaled_dot_product_attention.
    Returns [B, H, T or stop - start, R] in float32, differentiable into query and key; 0 where a query sees no key.
    Raises ValueError for shapes that do not fit.
    """
    if roles.shape != (key.shape[0], key.shape[2]):
        raise ValueError(f"role_mass: roles are {tuple(roles.shape)}, keys want {(key.shape[0], key.shape[2])}")
    value = indicators(roles, of, key, key.shape[-1])
    if attend is not None:
        out = attend(query, key, value)
        if queries is not None:
            out = out[:, :, slice(*queries)]
    elif cu_seqlens is not None:
        out = _packed(query, key, value, queries, cu_seqlens.tolist(), scale, causal)
    elif key_mask is not None and not bool(key_mask.all()):
        out = _padded(query, key, value, queries, key_mask.bool(), scale, causal)
    else:
        out = _attend_range(query, key, value, queries, scale, causal)
    return out[..., : len(of)].float()


def _attend(query, key, value, mask=None, causal=False, scale=None) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    if mask is not None and groups > 1 and query.is_cuda:
        # With a mask and grouped queries CUDA would fall back to the kernel that keeps the whole map.
        key, value, groups = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1), 1
    grouped = {"enable_gqa": True} if groups > 1 else {}
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale, **grouped)


def _attend_range(query, key, value, queries, scale, causal) -> torch.Tensor:
    """Rows [start, stop) of causal attention without padding, never more than _ROWS × S of explicit mask."""
    t, s = query.shape[2], key.shape[2]
    start, stop = queries if queries is not None else (0, t)
    if not 0 <= start <= stop <= t:
        raise ValueError(f"role_mass: query range {(start, stop)} outside 0 … {t}")
    if not causal:
        return _attend(query[:, :, start:stop], key, value, scale=scale)
    # The mask-free causal kernel aligns top left and starts at row 0: it pays when most rows are asked for.
    if t == s and 2 * (stop - start) > stop:
        rows = slice(0, stop)
        return _attend(query[:, :, rows], key[:, :, rows], value[:, :, rows], causal=True, scale=scale)[:, :, start:]
    blocks = [query.new_zeros(*query.shape[:2], 0, query.shape[3])]
    for first in range(start, stop, _ROWS):
        last = min(first + _ROWS, stop)
        seen = last + s - t
        mask = torch.ones(last - first, seen, dtype=torch.bool, device=query.device).tril(first + s - t)
        blocks.append(_attend(query[:, :, first:last], key[:, :, :seen], value[:, :, :seen], mask, scale=scale))
    return torch.cat(blocks, dim=2)


def _padded(query, key, value, queries, key_mask, scale, causal) -> torch.Tensor:
    """Padding on either side, row by row: each row attends within its own unpadded part."""
    t, s = query.shape[2], key.shape[2]
    start, stop = queries if queries is not None else (0, t)
    out = query.new_zeros(*query.shape[:2], stop - start, query.shape[3])
    rows = []
    for b in range(query.shape[0]):
        kept = key_mask[b].nonzero().flatten()
        if len(kept) == 0:
            rows.append(out[b : b + 1])
            continue
        low, high = int(kept[0]), int(kept[-1]) + 1
        if len(kept) != high - low:
            raise ValueError(f"role_mass: row {b}: the key mask has a hole between {low} and {high}")
        # Query i sits at key i + s - t; its row is real where that key is.
        real = (max(low + t - s, 0), min(high + t - s, t))
        first, last = max(start, real[0]), min(stop, real[1])
        if first >= last:
            rows.append(out[b : b + 1])
            continue
        part = _attend_range(
            query[b : b + 1, :, real[0] : real[1]],
            key[b : b + 1, :, low:high],
            value[b : b + 1, :, low:high],
            (first - real[0], last - real[0]),
            scale,
            causal,
        )
        rows.append(F.pad(part, (0, 0, first - start, stop - last)))
    return torch.cat(rows)


def _packed(query, key, value, queries, borders, scale, causal) -> torch.Tensor:
    """Sequences packed into one row: each attends within its own borders."""
    t = query.shape[2]
    if query.shape[0] != 1 or borders[0] != 0 or borders[-1] != t or key.shape[2] != t:
        raise ValueError(
            f"role_mass: packed input wants one row with borders 0 … {t}, got {borders[0]} … {borders[-1]}"
        )
    start, stop = queries if queries is not None else (0, t)
    blocks = [query.new_zeros(*query.shape[:2], 0, query.shape[3])]
    for low, high in itertools.pairwise(borders):
        first, last = max(start, low), min(stop, high)
        if first < last:
            part = slice(low, high)
            inner = (first - low, last - low)
            blocks.append(_attend_range(query[:, :, part], key[:, :, part], value[:, :, part], inner, scale, causal))
    return torch.cat(blocks, dim=2)
