"""Attention to each visual token, exact, without the map.

The weights of query i on visual keys are its visual mass shared out by a softmax over the visual keys alone:

    A[h, i, j] = m_VISUAL[h, i] · softmax over visible visual keys of (q_i · k_j · scale)[j]

so only those columns of QKᵀ are computed, block by block. Masses come from the attention kernel itself.
"""

from __future__ import annotations

import math

import torch

from verl_avar.attention.bias import Effect
from verl_avar.attention.kernels import Call
from verl_avar.attention.record import Record
from verl_avar.roles import Role

BLOCK = 2**24  # numbers of one block of weights: 64 MiB


@torch.no_grad()
def report(record: Record, call: Call, roles: torch.Tensor, mass: torch.Tensor, effect: Effect | None) -> None:
    """Calls `record.visual(layer, b, rows, attention, mass)` for blocks of the asked queries of each sequence b.

    roles: uint8 [B, S], of the keys; mass: [B, H, T, R], of this call under `effect`.
    rows: int64 [n], positions in the padded sequence, ascending. attention: float32 [H, n, V], of these queries on the
    V visual tokens of sequence b in order (in a cross-attention layer, on all vision states); 0 on what a query does
    not see. mass: float32 [H, n, R] of the same queries. Sequences without a visual token or an asked query are
    skipped.
    """
    query, key, column = call.query, call.key, record.of.index(Role.VISUAL)
    for b in range(query.shape[0]):
        columns = (roles[b] == Role.VISUAL).nonzero().flatten()
        asked = record.queries[b].nonzero().flatten() if record.queries is not None else call.positions()
        if not len(columns) or not len(asked):
            continue
        keys = key[b][:, columns].float()
        for rows in asked.split(max(1, BLOCK // (query.shape[1] * len(columns)))):
            q = query[b][:, rows].float().unflatten(0, (len(keys), -1))
            logits = (q @ keys[:, None].transpose(-1, -2)).flatten(0, 1) * call.scale
            if effect is not None and effect.mode == "scale_logits":
                factor = torch.tensor(math.exp(effect.visual), device=logits.device)
                logits = logits * (
                    factor if effect.rows is None else torch.where(effect.rows[b, rows], factor, 1.0)[:, None]
                )
            logits = call.masked(call.capped(logits), b, rows, columns)
            weights = logits.softmax(dim=-1).masked_fill(logits.isneginf().all(dim=-1, keepdim=True), 0.0)
            shared = mass[b][:, rows].detach()
            record.visual(call.layer, b, rows, weights * shared[..., column, None], shared)
