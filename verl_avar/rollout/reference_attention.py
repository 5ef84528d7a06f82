"""What `triton_attention.paged_attention` computes, in torch, one request and full attention maps at a time.

AVAR §2.2 (masses) and §2.3 (bias), arXiv:2603.03825.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from verl_avar.roles import Role


def reference_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    slot_mapping: torch.Tensor,
    roles: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    masses: torch.Tensor | None,
    *,
    scale: float,
    max_query_len: int | None = None,
    workspace: object = None,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Arguments and results are those of `paged_attention`; max_query_len and workspace are not looked at. dtype: what
    to compute in. Waits for the device, and holds a map [H, queries, keys] of one request."""
    block_size, kv_heads = cache.shape[1:3]
    head_size = query.shape[2]
    group = query.shape[1] // kv_heads
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    for request, (start, stop) in enumerate(pairwise(starts)):
        index = torch.arange(lengths[request], device=query.device)
        slots = block_table[request, index // block_size].long() * block_size + index % block_size
        key, value = cache[slots // block_size, slots % block_size].to(dtype).split(head_size, dim=-1)
        q = query[start:stop].to(dtype)
        logits = torch.einsum("qhd,khd->hqk", q, key.repeat_interleave(group, dim=1)) * scale
        is_role = torch.stack([roles[slots] == Role.VISUAL, roles[slots] == Role.SYSTEM]).to(dtype)
        own = slot_mapping[start:stop]
        own_bias = torch.where(own[:, None] >= 0, bias[own.clamp(min=0) // block_size], 0.0).to(dtype)
        logits += own_bias @ is_role
        position = lengths[request] - (stop - start) + torch.arange(stop - start, device=query.device)
        weights = logits.masked_fill(index > position[:, None], -torch.inf).softmax(dim=-1)
        weights[:, position < 0] = 0.0  # these queries see no key
        out[start:stop] = torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(group, dim=1)).to(out.dtype)
        if masses is not None:
            masses[start:stop] = torch.einsum("hqk,ck->qhc", weights, is_role).to(masses.dtype)
