"""VARS in the trainer: the visual term of each rollout, from the rollout or the actor, added to its reward (AVAR §3.3).

    reward = acc + lambda_f · format + lambda_v · visual        on the last response token, before advantages

The reward function adds the term where the number comes from the rollout and nothing compares it with others. The
trainer adds it where only the trainer knows it: measured by the actor, or normalised over a prompt's rollouts. The
term is described once, by the reward function's arguments; `hand_over` then takes it out of that function's hands.

Terms travel as float64 [S], one per session (rollout of a prompt), NaN where there is no score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from omegaconf import DictConfig, open_dict

SOURCES = ("rollout", "actor")
NORMALISE = ("none", "group", "group_std")
VISUAL_TERMS = ("ratio", "share", "clip")
TERM = ("lambda_v", "visual", "visual_clip", "gate", "on_missing")  # arguments of the reward function
GROUP_EPS = 1e-6  # beside the standard deviation, as in verl's GRPO


@dataclass(frozen=True)
class VisualReward:
    """The block `avar.vars` and the reward function's arguments that describe the term. ValueError for a bad value."""

    source: str = "rollout"  # whose number is rewarded
    normalise: str = "none"  # "group": minus the mean over the prompt's rollouts; "group_std": then over their std
    lambda_v: float | None = None
    visual: str = "ratio"
    visual_clip: float = 5.0
    gate: bool = True
    on_missing: str = "error"

    def __post_init__(self):
        _one_of("avar.vars.source", self.source, SOURCES)
        _one_of("avar.vars.normalise", self.normalise, NORMALISE)
        if not self.by_trainer:
            return  # the reward function checks its own arguments
        where = "reward.custom_reward_function.reward_kwargs"
        if not _is_number(self.lambda_v):
            raise ValueError(f"{where}.lambda_v: got {self.lambda_v!r}, wanted the weight of the visual term")
        _one_of(f"{where}.visual", self.visual, VISUAL_TERMS)
        _one_of(f"{where}.on_missing", self.on_missing, ("error", "zero"))
        if not _is_number(self.visual_clip):
            raise ValueError(f"{where}.visual_clip: got {self.visual_clip!r}, wanted a number")

    @classmethod
    def of(cls, config: DictConfig) -> VisualReward:
        """From a whole run's config. Raises ValueError for an unknown key of `avar.vars` or a bad value."""
        block = dict((config.get("avar") or {}).get("vars") or {})
        known = [f.name for f in fields(cls) if f.name not in TERM]
        if unknown := sorted(set(block) - set(known)):
            raise ValueError(f"avar.vars: unknown key {', '.join(unknown)}; the keys are {', '.join(known)}")
        arguments = config.reward.custom_reward_function.get("reward_kwargs") or {}
        return cls(**block, **{name: arguments[name] for name in TERM if name in arguments})

    @property
    def by_trainer(self) -> bool:
        """Whether the trainer adds the term; otherwise the reward function does."""
        return self.source == "actor" or self.normalise != "none"

    @property
    def score(self) -> str:
        """The engine's per-token output that the term is the mean of."""
        return "visual_share" if self.visual == "share" else "visual_ratio"


def hand_over(config: DictConfig) -> VisualReward:
    """Settings of the run; where the trainer adds the term, the reward function is told to leave it out (in place)."""
    settings = VisualReward.of(config)
    if settings.by_trainer:
        with open_dict(config.reward.custom_reward_function):
            arguments = config.reward.custom_reward_function.reward_kwargs
            arguments.lambda_v = 0.0
            if settings.source == "actor":
                arguments.on_missing = "zero"  # the rollouts need not have a score
    return settings


@dataclass(frozen=True)
class Sessions:
    """Which row stands for which rollout. An agent loop may write several rows in a session; verl rewards the last."""

    final: torch.Tensor  # int64 [S], the last row of each session
    group: torch.Tensor  # int64 [S], equal for the rollouts of one prompt
    of_row: torch.Tensor  # int64 [B], the session of each row, -1 for verl's padding rows

    @classmethod
    def of(cls, keys: Sequence[str], padding: Sequence[bool]) -> Sessions:
        """keys: `{uid}_{session}_{index}` per row. padding: rows that only fill the batch."""
        names, last, of_row = {}, [], []
        for row, (key, fills) in enumerate(zip(keys, padding, strict=True)):
            if fills:
                of_row.append(-1)
                continue
            name, index = key.rsplit("_", 1)
            session = names.setdefault(name, len(names))
            of_row.append(session)
            if session == len(last):
                last.append((int(index), row))
            last[session] = max(last[session], (int(index), row))
        uids = [name.rsplit("_", 1)[0] for name in names]
        numbers = {uid: i for i, uid in enumerate(dict.fromkeys(uids))}
        return cls(
            torch.tensor([row for _, row in last], dtype=torch.long),
            torch.tensor([numbers[uid] for uid in uids], dtype=torch.long),
            torch.tensor(of_row, dtype=torch.long),
        )


def response_means(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Means of nested per-token scores [B, n_b] where the nested mask [B, n_b] is 1; 0 for a row without any."""
    rows = zip(scores.unbind(), mask.unbind(), strict=True)
    return torch.stack([row.double()[on.bool()].sum() / max(1, int(on.sum())) for row, on in rows])


def actor_terms(scores: torch.Tensor, system: torch.Tensor, mask: torch.Tensor, settings: VisualReward) -> torch.Tensor:
    """Ungated terms [B] from what the actor measured: nested per-token scores, system masses and response mask.

    NaN where there is no system turn (no system mass at all: a ratio would measure its eps). ValueError where the
    attention isn't finite.
    """
    terms = response_means(scores, mask)
    if not terms.isfinite().all():
        raise ValueError(f"the actor's {settings.score} is {terms[~terms.isfinite()][0]}: its attention is broken")
    if settings.visual == "clip":
        terms = terms.clamp(max=settings.visual_clip)
    written = torch.stack([row.sum() > 0 for row in mask.unbind()])
    return torch.where(written & (response_means(system, mask) == 0), torch.nan, terms)


def rollout_terms(rewards: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """Ungated terms [S] that the reward function read from the rollouts, from what it returned for each."""
    return torch.tensor(
        [math.nan if info.get("visual_missing", 0.0) else info.get("visual_raw", math.nan) for info in rewards],
        dtype=torch.float64,
    )


def counted_terms(
    terms: torch.Tensor, rewards: Sequence[Mapping[str, Any]], group: torch.Tensor, settings: VisualReward
) -> torch.Tensor:
    """What is rewarded, before lambda_v: terms [S] normalised over their group [S], then gated; 0 without a score.

    Means are over all of a prompt's rollouts that have a score, right and wrong ones, so that the gate does not change
    what a right answer is compared with. rewards: what the reward function returned for each rollout.
    Raises ValueError for a missing score (`on_missing=error`), or where a reward function has counted the term itself.
    """
    if weights := sorted({float(info["lambda_v"]) for info in rewards if info.get("lambda_v")}):
        raise ValueError(
            f"the reward function added the visual term with lambda_v={weights[0]} and the trainer would add it again: "
            "these rollouts were scored by a run with other settings of avar.vars, or the function ignores lambda_v=0"
        )
    missing = terms.isnan()
    if missing.any() and settings.on_missing == "error":
        raise ValueError(
            f"{int(missing.sum())} of {len(terms)} rollouts have no visual score from the {settings.source} (no system "
            'turn, or no score came): mend that, or set reward_kwargs.on_missing="zero"'
        )
    terms = normalised(terms, group, settings.normalise).nan_to_num()
    if not settings.gate:
        return terms
    if any("acc" not in info for info in rewards):
        raise ValueError("the reward function returns no 'acc', which opens the gate: return it, or set gate=false")
    return terms * torch.tensor([float(info["acc"] > 0) for info in rewards], dtype=terms.dtype)


def normalised(terms: torch.Tensor, group: torch.Tensor, how: str) -> torch.Tensor:
    """Terms [S] relative to the others of their group [S]; NaN stays and takes no part. A term without others is 0."""
    if how == "none":
        return terms
    result = terms.clone()
    for number in group.unique():
        where = (group == number) & ~terms.isnan()
        others = terms[where]
        result[where] = others - others.mean()
        if how == "group_std" and len(others) > 1:
            result[where] /= others.std() + GROUP_EPS
    return result


def add_on_last_token(rewards: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Nested per-token rewards [B, n_b] with values [B] added where verl puts a response's score: its last token."""
    flat = rewards.values().clone()
    flat[rewards.offsets()[1:] - 1] += values.to(flat.dtype)
    return torch.nested.nested_tensor_from_jagged(flat, rewards.offsets())


def source_metrics(rollout: torch.Tensor, actor: torch.Tensor | None) -> dict[str, float]:
    """Means of each source over the rollouts that have it, and how far the two are apart on those that have both.

    Terms [S], ungated. `vars/difference` is the mean absolute difference.
    """
    metrics = {}
    for name, terms in (("rollout", rollout), ("actor", actor)):
        if terms is not None and not terms.isnan().all():
            metrics[f"vars/{name}"] = float(terms.nanmean())
    if actor is not None and not (both := (rollout - actor).abs()).isnan().all():
        metrics["vars/difference"] = float(both.nanmean())
        metrics["vars/difference_max"] = float(both.nan_to_num().max())
    return metrics


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(choices)}")
