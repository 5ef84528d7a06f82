"""VARS: visual-anchored reward shaping (AVAR §3.3, arXiv:2603.03825).

    r_visual = mean over response queries t, mean over layers l of a_VISUAL[l, t] / (a_SYSTEM[l, t] + ε)
    a_R[l, t] = mean over heads of the mass of role R

This file turns masses into the score; gating on correctness and the weight λ belong to the reward function
(`reward_fns/avar.py`), which has no masses.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from verl_avar.roles import Role, query_mask

EPS = 1e-6


@dataclass(frozen=True)
class VisualScore:
    """Visual attention of one response; the fields of `kv_transfer_params["visual_attention"]`.

    ratio, share and vas are None where the sequence has no system turn (a ratio would measure ε alone).
    """

    ratio: float | None  # AVAR §3.3, ungated: heads averaged before the ratio
    share: float | None  # mean of v / (v + s), bounded by 1
    visual_mass: float  # mean over layers, heads and response queries
    system_mass: float
    vas: float | None  # AVAR §2.2 over the response: the mean of every head's own ratio
    n: int  # queries counted
    tokens: list[float] | None = None  # the per-token ratios, when asked for

    def as_dict(self) -> dict:
        """Plain types; without `tokens` where they were not asked for."""
        fields = asdict(self)
        if self.tokens is None:
            del fields["tokens"]
        return fields


SCORES = ("ratio", "share", "visual_mass", "system_mass", "vas")  # of a token, in this order


def head_sums(visual: torch.Tensor, system: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    """What the scores need of the heads: masses [L, H, ...] -> [3, L, ...], sums over H of the visual mass, the system
    mass and their ratio. Sums over parts of the heads add up, so that tensor-parallel ranks can share them."""
    return torch.stack((visual.sum(1), system.sum(1), (visual / (system + eps)).sum(1)))


def layer_scores(head_means: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    """Per-token scores [5, ...], in the order of `SCORES`, from `head_sums` divided by the number of heads."""
    v, s, vas = head_means
    return torch.stack((v / (s + eps), v / (v + s + eps), v, s, vas)).mean(dim=1)


def token_scores(visual: torch.Tensor, system: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    """Per-token scores from masses [L, B, H, T] or [L, H, T].

    Returns [5, B, T] or [5, T], in the order of `SCORES`; each is a mean over layers.
    """
    v, s = visual.movedim(-2, 1), system.movedim(-2, 1)
    return layer_scores(head_sums(v, s, eps) / v.shape[1], eps)


def summarise(scores: torch.Tensor, has_system: bool = True, tokens: bool = False) -> VisualScore:
    """The score of one response from its per-token scores [5, n], in the order of `SCORES`."""
    n = scores.shape[-1]
    ratio, share, visual, system, vas = scores.double().mean(dim=-1).tolist() if n else (0.0,) * len(SCORES)
    return VisualScore(
        ratio=ratio if has_system else None,
        share=share if has_system else None,
        visual_mass=visual,
        system_mass=system,
        vas=vas if has_system else None,
        n=n,
        tokens=scores[0].tolist() if tokens and has_system else None,
    )


def visual_scores(
    visual: torch.Tensor, system: torch.Tensor, roles: torch.Tensor, eps: float = EPS, tokens: bool = False
) -> list[VisualScore]:
    """The score of each row of a batch: masses [L, B, H, T] and roles uint8 [B, T]."""
    scores = token_scores(visual, system, eps)
    queries = query_mask(roles, "response")
    has_system = (roles == Role.SYSTEM).any(dim=-1)
    return [summarise(scores[:, b, queries[b]], bool(has_system[b]), tokens) for b in range(roles.shape[0])]
