"""Attention to single visual tokens, summed up while a `probe` is open: sinks, borders and where each step looks.

Visual tokens at the borders of an image are known to gather attention whatever the question (attention sinks). How
much of VAS they carry is exact: VAS is linear in the visual tokens' masses, so every token has its share of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from verl_avar.roles import query_mask
from verl_avar.vas import EPS

# A sink takes more than a stated share of the visual mass, and at least this many times an even part of it, so that an
# image of few tokens is not all sinks.
TIMES_EVEN = 5


@dataclass
class TokenSums:
    """Sums over layers and a scope's queries for each of V visual tokens; float64 [V] each."""

    mass: torch.Tensor  # of the mass, heads averaged
    ratio: torch.Tensor  # of each head's mass over that head's system mass, heads averaged
    head_mean: torch.Tensor  # of the head-averaged mass over the head-averaged system mass


class VisualTokens:
    """The callback of `probe(visual=…)`: sums by sequence and scope, and for followed sequences by response token.

    roles: uint8 [B, T]; scopes: of `roles.SCOPES`; system: the column of SYSTEM among the probe's roles; follow: rows
    whose response is followed token by token.
    """

    def __init__(self, roles: torch.Tensor, scopes: Sequence[str], system: int, follow: Sequence[int] = ()):
        self.scopes = tuple(scopes)
        self._system = system
        self._queries = torch.stack([query_mask(roles, scope) for scope in scopes])  # [S, B, T]
        self._response = query_mask(roles, "response")
        self._sums: dict[int, torch.Tensor] = {}  # row -> [S, 3, V]
        self._layers: set[int] = set()
        self._steps: dict[int, torch.Tensor | None] = dict.fromkeys(follow)  # row -> [n, V]

    def __call__(self, layer: int, b: int, rows: torch.Tensor, attention: torch.Tensor, mass: torch.Tensor) -> None:
        """attention: [H, n, V] of the queries `rows` [n]; mass: [H, n, R]."""
        heads, n, tokens = attention.shape
        self._layers.add(layer)
        system = mass[..., self._system]
        per_head = 1 / (system + EPS)
        averaged = (1 / (system.mean(0) + EPS)).expand(heads, n)
        kinds = torch.stack([torch.ones_like(per_head), per_head, averaged]) / heads  # [3, H, n]
        weights = kinds * self._queries[:, b, rows][:, None, None].to(kinds.dtype)  # [S, 3, H, n]
        sums = (weights.reshape(-1, heads * n) @ attention.reshape(heads * n, tokens)).double()
        sums = sums.view(len(self.scopes), 3, tokens).cpu()
        self._sums[b] = self._sums[b] + sums if b in self._sums else sums
        if b in self._steps:
            asked = self._response[b, rows]
            place = self._response[b].cumsum(-1)[rows[asked]] - 1
            if self._steps[b] is None:
                self._steps[b] = torch.zeros(int(self._response[b].sum()), tokens)
            self._steps[b].index_add_(0, place.cpu(), attention[:, asked].mean(0).cpu().float())

    def sums(self, b: int, scope: str) -> TokenSums:
        """Sums of one sequence in one scope."""
        return TokenSums(*self._sums[b][self.scopes.index(scope)])

    def sinks(self, b: int, share: float) -> np.ndarray:
        """Which visual tokens take more than `share` of the visual mass over all queries and layers: bool [V]."""
        mass = self._sums[b][:, 0].sum(0).numpy()
        return mass > max(share, TIMES_EVEN / len(mass)) * mass.sum()

    def steps(self, b: int) -> np.ndarray:
        """Attention of each response query to each visual token, mean over layers and heads: [n, V]."""
        return (self._steps[b] / max(1, len(self._layers))).numpy()


def without(sums: TokenSums, keep: np.ndarray, layers: int, queries: int) -> dict[str, float]:
    """VAS (paper), head-averaged VAS and visual mass of the kept tokens alone. keep: bool [V]."""
    kept = torch.from_numpy(keep)
    count = layers * queries
    return {
        "vas": float(sums.ratio[kept].sum()) / count,
        "head_mean": float(sums.head_mean[kept].sum()) / count,
        "visual": float(sums.mass[kept].sum()) / count,
    }
