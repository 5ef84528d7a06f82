"""AGTO: the attention-guided training objective (AVAR §3.2, arXiv:2603.03825).

    L_total    = L_LM + α·L_enhance + β·L_suppress
    L_enhance  = −mean over layers and heads of log( mean over queries of m_VISUAL / |K_img| + ε )
    L_suppress = +mean over layers and heads of log( mean over queries of m_SYSTEM / |K_sys| + ε )

per sample, then averaged over the samples that have the role.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from verl_avar.roles import Role, query_mask

EPS = 1e-6


@dataclass(frozen=True)
class AgtoTerms:
    """Sums over the samples that have the term, with their counts, so that micro-batches add up exactly."""

    enhance_sum: torch.Tensor  # scalar, differentiable
    suppress_sum: torch.Tensor
    enhance_count: int
    suppress_count: int

    def loss(
        self, alpha: float, beta: float, enhance_total: int | None = None, suppress_total: int | None = None
    ) -> torch.Tensor:
        """α·L_enhance + β·L_suppress.

        With the totals of a whole batch given, the losses of its micro-batches sum to the loss of the batch.
        """
        enhance = self.enhance_sum / max(1, self.enhance_count if enhance_total is None else enhance_total)
        suppress = self.suppress_sum / max(1, self.suppress_count if suppress_total is None else suppress_total)
        return alpha * enhance + beta * suppress


def agto_terms(
    visual: torch.Tensor,
    system: torch.Tensor,
    roles: torch.Tensor,
    *,
    queries: str = "response",
    eps: float = EPS,
    system_floor: float | None = None,
) -> AgtoTerms:
    """The two terms of AGTO for a batch.

    visual, system: masses [L, B, H, T] over the probed layers; roles: uint8 [B, T]. queries: the scope Q, as in
    `roles.query_mask`. system_floor: a query-averaged system mass (of one layer and head) below this is not suppressed
    any further; without it the term drives the mass towards ε, and accuracy with it.
    A sample without an image, a system turn or queries contributes nothing to the term it lacks.
    """
    wanted = query_mask(roles, queries)
    count = wanted.sum(-1)

    def per_sample(mass: torch.Tensor, role: Role, floor: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        keys = (roles == role).sum(-1)
        present = (keys > 0) & (count > 0)
        mean = (mass * wanted[None, :, None]).sum(-1) / count.clamp(min=1)[None, :, None]  # [L, B, H]
        if floor is not None:
            mean = mean.clamp(min=floor)
        log = (mean / keys.clamp(min=1)[None, :, None] + eps).log().mean(dim=(0, 2))
        return log.masked_fill(~present, 0.0).sum(), present.sum()

    enhance, with_visual = per_sample(visual, Role.VISUAL, None)
    suppress, with_system = per_sample(system, Role.SYSTEM, system_floor)
    return AgtoTerms(-enhance, suppress, int(with_visual), int(with_system))


def agto_counts(roles: torch.Tensor, queries: str = "response") -> tuple[int, int]:
    """How many samples have the enhance and the suppress term: known from the roles [B, T], before any forward pass."""
    asked = query_mask(roles, queries).any(-1)
    return tuple(int(((roles == role).any(-1) & asked).sum()) for role in (Role.VISUAL, Role.SYSTEM))


def agto_loss(
    visual: torch.Tensor,
    system: torch.Tensor,
    roles: torch.Tensor,
    alpha: float = 0.15,
    beta: float = 0.15,
    **options,
) -> torch.Tensor:
    """α·L_enhance + β·L_suppress of one batch, a scalar; the options are those of `agto_terms`."""
    return agto_terms(visual, system, roles, **options).loss(alpha, beta)
