"""Attention to single visual tokens, summed up while a `probe` is open: sinks, borders and where each step looks.

Visual tokens at the borders of an image are known to gather attention whatever the question (attention sinks). How
much of VAS they carry is exact: VAS is linear in the visual tokens' masses, so every token has its share of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from verl_avar.roles import query_mask
from verl_avar.vas import EPS

# A sink takes more than a stated share of the visual mass, and at least this many times an even part of it, so that an
# image of few tokens is not all sinks.
TIMES_EVEN = 5


@dataclass
class TokenShares:
    """What each of V visual tokens adds to the figures of one sample and scope; float64 [V] each."""

    mass: torch.Tensor  # to the visual mass
    vas: torch.Tensor  # to the paper's VAS
    head_mean: torch.Tensor  # to the head-averaged VAS

    def without(self, dropped: np.ndarray) -> dict[str, float]:
        """The figures without some tokens. dropped: bool [V]."""
        kept = torch.from_numpy(~dropped)
        return {
            "vas": float(self.vas[kept].sum()),
            "head_mean": float(self.head_mean[kept].sum()),
            "visual": float(self.mass[kept].sum()),
        }


class VisualTokens:
    """The callback of `probe(visual=…)`: sums by sequence and scope, and for followed sequences by response token.

    roles: uint8 [B, T]; scopes: of `roles.SCOPES`; system: the column of SYSTEM among the probe's roles; reach: of
    each layer, bool [B, T], the queries that reach the system turn; follow: rows whose response is followed token by
    token.
    """

    def __init__(
        self,
        roles: torch.Tensor,
        scopes: Sequence[str],
        system: int,
        reach: Callable[[int], torch.Tensor],
        follow: Sequence[int] = (),
    ):
        self.scopes = tuple(scopes)
        self._system = system
        self._reach = reach
        self._queries = torch.stack([query_mask(roles, scope) for scope in scopes])  # [S, B, T]
        self._response = query_mask(roles, "response")
        self._sums: dict[int, torch.Tensor] = {}  # row -> [S, 3, V], sums over layers of means over queries
        self._layers: set[int] = set()
        self._reaching: dict[tuple[int, int], set[int]] = {}  # row, scope -> layers in which queries reach the system
        self._last: tuple[int, int] | None = None  # layer and row of the weights at hand
        self._steps: dict[int, torch.Tensor | None] = dict.fromkeys(follow)  # row -> [n, V]

    def __call__(self, layer: int, b: int, rows: torch.Tensor, attention: torch.Tensor, mass: torch.Tensor) -> None:
        """attention: [H, n, V] of the queries `rows` [n]; mass: [H, n, R]."""
        heads, n, tokens = attention.shape
        self._layers.add(layer)
        system = mass[..., self._system]
        per_head = 1 / (system + EPS)
        averaged = (1 / (system.mean(0) + EPS)).expand(heads, n)
        kinds = torch.stack([torch.ones_like(per_head), per_head, averaged]) / heads  # [3, H, n]
        weights = kinds * self._weights(layer, b)[:, :, None, rows].to(kinds.dtype)  # [S, 3, H, n]
        sums = (weights.reshape(-1, heads * n) @ attention.reshape(heads * n, tokens)).double()
        sums = sums.view(len(self.scopes), 3, tokens).cpu()
        self._sums[b] = self._sums[b] + sums if b in self._sums else sums
        if b in self._steps:
            asked = self._response[b, rows]
            place = self._response[b].cumsum(-1)[rows[asked]] - 1
            if self._steps[b] is None:
                self._steps[b] = torch.zeros(int(self._response[b].sum()), tokens)
            self._steps[b].index_add_(0, place.cpu(), attention[:, asked].mean(0).cpu().float())

    def _weights(self, layer: int, b: int) -> torch.Tensor:
        """Weight of each query in the means of mass, VAS and head-averaged VAS: [S, 3, T]."""
        if (layer, b) != self._last:
            reach = self._reach(layer)[b]
            asked = torch.stack([self._queries[:, b], self._queries[:, b] & reach, self._queries[:, b] & reach], dim=1)
            self._last, self._last_weights = (layer, b), asked / asked.sum(-1, keepdim=True).clamp(min=1)
            for scope in asked[:, 1].any(-1).nonzero().flatten().tolist():
                self._reaching.setdefault((b, scope), set()).add(layer)
        return self._last_weights

    def shares(self, b: int, scope: str) -> TokenShares:
        """Shares of one sequence in one scope."""
        scope = self.scopes.index(scope)
        mass, vas, head_mean = self._sums[b][scope]
        reaching = max(1, len(self._reaching.get((b, scope), ())))
        return TokenShares(mass / len(self._layers), vas / reaching, head_mean / reaching)

    def sinks(self, b: int, share: float) -> np.ndarray:
        """Which visual tokens take more than `share` of the visual mass over all queries and layers: bool [V]."""
        counts = self._queries[:, b].sum(-1).double().cpu()
        mass = (self._sums[b][:, 0] * counts[:, None]).sum(0).numpy()
        return mass > max(share, TIMES_EVEN / len(mass)) * mass.sum()

    def steps(self, b: int) -> np.ndarray:
        """Attention of each response query to each visual token, mean over layers and heads: [n, V]."""
        return (self._steps[b] / max(1, len(self._layers))).numpy()
