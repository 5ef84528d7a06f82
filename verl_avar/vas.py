"""Visual Attention Score (AVAR §2.2, arXiv:2603.03825): the diagnostic.

    VAS_i(l, h) = m_VISUAL[l, h, i] / m_SYSTEM[l, h, i];  VAS = mean over layers, heads and queries i of the scope

The paper's mean of ratios explodes when a single head ignores the system prompt, so the robust figures stand beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from verl_avar.roles import Role, query_mask

EPS = 1e-6
CLASSES = ((10.0, "narrow"), (15.0, "wide"), (float("inf"), "panoramic"))


def vas_class(vas: float) -> str | None:
    """The paper's class of a user-scope VAS: narrow below 10, wide to 15, panoramic above; None for NaN."""
    if math.isnan(vas):
        return None
    return next(name for bound, name in CLASSES if vas < bound or bound == float("inf"))


@dataclass(frozen=True)
class SampleVas:
    """One sample in one scope: means over its queries, by layer and head. Tensors are float64.

    Ratios are means over the queries that reach the system turn: in a sliding-window layer later queries don't, and
    have no VAS there. NaN where a layer has none.
    """

    queries: int
    reached: torch.Tensor  # [L], queries of each layer that reach the system turn
    ratio: torch.Tensor  # [L, H], VAS of each head
    visual: torch.Tensor  # [L, H], mass
    system: torch.Tensor  # [L, H], mass
    head_mean: torch.Tensor  # [L], heads averaged before the ratio
    by_query: torch.Tensor  # [queries], head-averaged ratio, mean over layers

    @property
    def paper(self) -> float:
        """Mean over queries, heads and layers."""
        return float(self.ratio.nanmean())

    @property
    def heads_averaged(self) -> float:
        """The same with heads averaged before the ratio."""
        return float(self.head_mean.nanmean())


def sample_vas(
    visual: torch.Tensor, system: torch.Tensor, reach: torch.Tensor | None = None, eps: float = EPS
) -> SampleVas:
    """VAS of one sample from the masses of its queries [L, H, n], n > 0 (AVAR §2.2).

    reach: bool [L, n], whether a query of a layer can attend to the whole system turn; all by default.
    Raises ValueError for masses that are not finite: half precision can overflow.
    """
    v, s = visual.detach().double(), system.detach().double()
    if not (v.isfinite().all() and s.isfinite().all()):
        raise ValueError("the attention masses are not finite numbers; run the model in float32 or bfloat16")
    seen = torch.ones_like(v[:, 0], dtype=torch.bool) if reach is None else reach
    per_head = (v / (s + eps)).masked_fill(~seen[:, None], torch.nan)
    head_mean = (v.mean(1) / (s.mean(1) + eps)).masked_fill(~seen, torch.nan)  # [L, n]
    return SampleVas(
        queries=v.shape[-1],
        reached=seen.sum(-1).double(),
        ratio=per_head.nanmean(-1),
        visual=v.mean(-1),
        system=s.mean(-1),
        head_mean=head_mean.nanmean(-1),
        by_query=head_mean.nanmean(0),
    )


@dataclass
class Vas:
    """VAS of one scope, accumulated over samples; every sample counts by its queries (AVAR §2.2).

    Samples without an image, a system turn or queries of the scope are skipped and counted.
    """

    scope: str
    eps: float = EPS
    samples: int = 0
    skipped: int = 0
    queries: int = 0
    _reached: torch.Tensor | float = 0.0  # queries by layer, float64 [L]
    _ratio: torch.Tensor | float = 0.0  # sums over queries, float64 [L, H]
    _visual: torch.Tensor | float = 0.0
    _system: torch.Tensor | float = 0.0
    _head_mean: torch.Tensor | float = 0.0  # sums over queries, float64 [L]
    _ratios: list[torch.Tensor] = field(default_factory=list)  # head-averaged ratio of each query, mean over layers

    def add(
        self, visual: torch.Tensor, system: torch.Tensor, roles: torch.Tensor, reach: torch.Tensor | None = None
    ) -> None:
        """Adds a batch: masses [L, B, H, T], roles uint8 [B, T]; reach: bool [L, B, T] (see `sample_vas`)."""
        asked = query_mask(roles, self.scope)
        for b in range(roles.shape[0]):
            has_roles = (roles[b] == Role.VISUAL).any() and (roles[b] == Role.SYSTEM).any()
            if has_roles and asked[b].any():
                v, s = visual[:, b, :, asked[b]], system[:, b, :, asked[b]]
                self.add_sample(sample_vas(v, s, None if reach is None else reach[:, b, asked[b]], self.eps))
            else:
                self.skipped += 1

    def add_sample(self, sample: SampleVas) -> None:
        """Adds one sample."""
        self._reached += sample.reached
        self._ratio += sample.ratio.nan_to_num() * sample.reached[:, None]
        self._head_mean += sample.head_mean.nan_to_num() * sample.reached
        self._visual += sample.visual * sample.queries
        self._system += sample.system * sample.queries
        self._ratios.append(sample.by_query.float())
        self.samples += 1
        self.queries += sample.queries

    @property
    def by_head(self) -> torch.Tensor:
        """The paper's mean of ratios per layer and head: float64 [L, H]; NaN for a layer without a VAS."""
        self._check()
        return self._ratio / self._reached[:, None]

    def mass_by_head(self, role: Role) -> torch.Tensor:
        """Mean mass of VISUAL or SYSTEM per layer and head: float64 [L, H]."""
        self._check()
        return {Role.VISUAL: self._visual, Role.SYSTEM: self._system}[role] / self.queries

    def summary(self) -> dict:
        """Plain numbers: `paper` (mean of ratios), `head_mean` (ratio of head-averaged masses), `median` (over queries,
        of the head-averaged ratio), `mass`, `by_layer` (head-averaged) and the counts.
        """
        by_head = self.by_head
        head_mean = self._head_mean / self._reached
        return {
            "paper": float(by_head.nanmean()),
            "head_mean": float(head_mean.nanmean()),
            "median": float(torch.cat(self._ratios).nanmedian()),
            "mass": {
                "visual": float(self.mass_by_head(Role.VISUAL).mean()),
                "system": float(self.mass_by_head(Role.SYSTEM).mean()),
            },
            "by_layer": head_mean.tolist(),
            "samples": self.samples,
            "skipped": self.skipped,
            "queries": self.queries,
        }

    def _check(self) -> None:
        if self.queries == 0:
            raise ValueError(
                f"VAS ({self.scope} scope): none of {self.skipped} samples has an image, a system turn and queries"
            )
