"""Attention over a paged KV cache that adds the role bias and returns the role masses (AVAR §2), in torch.

The masses come out of the same softmax as the output: `m_R = softmax(QKᵀ·scale + bias)·1_R`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from verl_avar.rollout.slots import SlotState

MAX_WEIGHTS = 2**24  # attention weights held at once (64 MiB in float32)


@dataclass
class Tile:
    """Queries of equal number from some requests, with all the keys that any of them sees.

    rows: [B, Q] rows of the step's flat query. keys: [B, H_kv, K] rows of the cache seen as [slots·H_kv, 2·D] (those
    of slot 0 where padded); gathering by head keeps the products contiguous, which is five times quicker than gathering
    by slot. bias: [B, Q, K] what to add to the logits, -inf where a query may not look. indicator: [B, K, 2].
    """

    rows: torch.Tensor
    keys: torch.Tensor
    bias: torch.Tensor
    indicator: torch.Tensor


def plan_tiles(
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    slot_mapping: torch.Tensor,
    state: SlotState,
    heads: int,
    kv_heads: int,
) -> list[Tile]:
    """Groups a step's requests by number of queries, within MAX_WEIGHTS; done once for all layers.

    query_start: [R+1], seq_lens: [R] (keys of each request, this step's included), block_table: [R, blocks],
    slot_mapping: [tokens], where each query's own key is.
    """
    query_lens = query_start[1:] - query_start[:-1]
    tiles = []
    for queries in query_lens.unique().tolist():
        if queries == 0:
            continue
        requests = torch.nonzero(query_lens == queries).flatten()
        # Neighbours in length share a tile, so that one long request doesn't pad all the others.
        requests = requests[seq_lens[requests].argsort()]
        for some, first, last in _split(seq_lens[requests].tolist(), queries, heads):
            chosen = requests[some]
            rows = query_start[chosen, None].long() + torch.arange(first, last)
            last_key = seq_lens[chosen, None].long() - queries + torch.arange(first, last)
            length = int(last_key.max()) + 1
            position = torch.arange(length)
            blocks = block_table[chosen][:, position // state.block_size].long()
            visible = position <= last_key[:, :, None]
            slots = torch.where(visible[:, -1], blocks * state.block_size + position % state.block_size, 0)
            keys = slots[:, None] * kv_heads + torch.arange(kv_heads)[:, None]
            indicator = state.indicator(slots)
            bias = state.bias_of(slot_mapping[rows]) @ indicator.transpose(1, 2)
            tiles.append(Tile(rows, keys, bias.masked_fill(~visible, -torch.inf), indicator))
    return tiles


def _split(seq_lens: list[int], queries: int, heads: int) -> Iterator[tuple[slice, int, int]]:
    """Requests (of ascending length) and query ranges of each tile, within MAX_WEIGHTS where one query allows it."""
    start = 0
    while start < len(seq_lens):
        stop = start + 1
        while stop < len(seq_lens) and (stop + 1 - start) * queries * heads * seq_lens[stop] <= MAX_WEIGHTS:
            stop += 1
        step = max(1, MAX_WEIGHTS // ((stop - start) * heads * seq_lens[stop - 1]))
        for first in range(0, queries, step):
            yield slice(start, stop), first, min(first + step, queries)
        start = stop


def attend(
    query: torch.Tensor, cache: torch.Tensor, tile: Tile, scale: float, out: torch.Tensor, masses: torch.Tensor
) -> None:
    """Attention of one tile, in float32.

    query: [tokens, H, D]. cache: [slots, H_kv, 2·D], keys then values. Writes the tile's rows of `out` [tokens, H, D]
    and of `masses` [tokens, 2] (visual, system; means over heads).
    """
    batch, queries = tile.rows.shape
    heads, size = query.shape[1:]
    kv_heads, keys = tile.keys.shape[1:]
    group = heads // kv_heads
    rows = cache.flatten(0, 1).index_select(0, tile.keys.flatten())
    key, value = rows.view(batch, kv_heads, keys, 2 * size).float().split(size, dim=-1)
    q = query[tile.rows].float().view(batch, queries, kv_heads, group, size).permute(0, 2, 3, 1, 4)
    logits = (q.flatten(2, 3) @ key.transpose(-1, -2)).mul_(scale).view(batch, kv_heads, group, queries, keys)
    weights = logits.add_(tile.bias[:, None, None]).softmax(dim=-1).flatten(2, 3)  # [B, H_kv, group·Q, K]
    attended = (weights @ value).view(batch, kv_heads, group, queries, size).permute(0, 3, 1, 2, 4)
    out[tile.rows] = attended.reshape(batch, queries, heads, size).to(out.dtype)
    mass = (weights @ tile.indicator[:, None]).view(batch, heads, queries, 2)
    masses[tile.rows] = mass.mean(dim=1)
