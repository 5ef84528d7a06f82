"""The figures of a mini-batch: AGTO's terms (AVAR §3.2) and the attention of its samples (AVAR §2.2), over all ranks.

Sums and counts are kept until the mini-batch is done and divided once, so that no way of cutting it changes a figure.
"""

from __future__ import annotations

import torch

from verl_avar.reward import SCORES
from verl_avar.roles import Role, query_mask
from verl_avar.training.config import AvarConfig

QUERIES = "user+response"  # what the figures need of the masses


class Figures:
    """One mini-batch of one rank. config: the settings of this step; counts: samples, over all ranks, that have the
    enhance and the suppress term."""

    def __init__(self, config: AvarConfig, counts: tuple[int, int]):
        self.config, self.counts = config, counts
        self._sums: dict[str, torch.Tensor] = {}

    def add_terms(self, enhance_sum: torch.Tensor, suppress_sum: torch.Tensor) -> None:
        """AGTO's terms, summed over the samples of a micro-batch."""
        self._add("enhance", enhance_sum)
        self._add("suppress", suppress_sum)

    def add_scores(self, scores: torch.Tensor, roles: torch.Tensor) -> None:
        """Per-token scores [5, B, T] of a micro-batch, in the order of `reward.SCORES`, and its roles uint8 [B, T].

        A sample without an image has no visual mass, one without a system turn no system mass, and neither has a VAS:
        such samples are left out of that mean, as in `vas.Vas`.
        """
        of = dict(zip(SCORES, scores, strict=True))
        visual, system = ((roles == role).any(dim=-1, keepdim=True) for role in (Role.VISUAL, Role.SYSTEM))
        for scope in ("response", "user"):
            queries = query_mask(roles, scope) & visual & system
            self._add_mean(f"vas_{scope}", of["ratio"], queries)
            self._add_mean(f"vas_{scope}_paper", of["vas"], queries)
        answers = query_mask(roles, "response")
        self._add_mean("visual_mass", of["visual_mass"], answers & visual)
        self._add_mean("system_mass", of["system_mass"], answers & system)

    def metrics(self, ranks: torch.distributed.ProcessGroup | None = None, copies: int = 1) -> dict[str, float]:
        """`agto/*` and `attention/*`, the same on all ranks; without the means of which the mini-batch has no query.

        ranks: every rank of the mini-batch. copies: how many of them hold each sample (they share its heads).
        """
        sums = torch.stack(list(self._sums.values())) / copies
        torch.distributed.all_reduce(sums, group=ranks)
        total = dict(zip(self._sums, sums.tolist(), strict=True))
        alpha, beta = self.config.alpha, self.config.beta
        enhance, suppress = (
            total.pop(name) / max(1, count) for name, count in zip(("enhance", "suppress"), self.counts, strict=True)
        )
        metrics = {"agto/enhance": enhance, "agto/suppress": suppress, "agto/alpha": alpha, "agto/beta": beta}
        metrics["agto/loss"] = alpha * enhance + beta * suppress
        for name in (name for name in total if not name.endswith("/count")):
            if (count := total[f"{name}/count"]) > 0:
                metrics[f"attention/{name}"] = total[name] / count
        return metrics

    def _add_mean(self, name: str, values: torch.Tensor, where: torch.Tensor) -> None:
        self._add(name, (values * where).sum())
        self._add(f"{name}/count", where.sum())

    def _add(self, name: str, value: torch.Tensor) -> None:
        value = value.detach().double()
        self._sums[name] = self._sums[name] + value if name in self._sums else value
