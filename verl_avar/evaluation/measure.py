"""VAS and attention masses of a batch of answers, sample by sample, in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from verl_avar import families
from verl_avar.attention.hf import probe
from verl_avar.evaluation.answer import Answers, attention_only
from verl_avar.evaluation.checkpoint import Checkpoint
from verl_avar.evaluation.visual_tokens import VisualTokens
from verl_avar.roles import Role, query_mask
from verl_avar.vas import sample_vas

ROLES = (Role.VISUAL, Role.SYSTEM, Role.USER, Role.RESPONSE)
SCOPES = {"user": ("user",), "response": ("response",), "both": ("user", "response")}


@dataclass(frozen=True)
class Measured:
    """One sample."""

    scopes: list[dict]  # a record for each scope with queries: see `_record`
    layers: list[int]
    steps: np.ndarray | None  # [n, V], where each response query looks, of a followed sample
    problem: str | None = None  # why there is nothing to measure


@torch.no_grad()
def measure(
    checkpoint: Checkpoint,
    answers: Answers,
    scope: str = "both",
    layers: Sequence[int] | None = None,
    sink_share: float = 0.05,
    borders: Sequence[np.ndarray | None] | None = None,
    follow: Sequence[int] = (),
) -> list[Measured]:
    """Measures every sample of a batch.

    scope: user, response or both. layers: those to measure, all by default; of a cross-attention model its cross-
    attention layers, beside which it always takes all of self-attention. borders: for each sample, which visual
    tokens lie on the border of their image (bool [V]), where that is known. follow: samples whose response is followed
    token by token over the image.
    """
    scopes, roles = SCOPES[scope], answers.roles
    # The pictures of a cross-attention model are not tokens of the sequence: no sinks, no borders.
    crossed = families.cross_attention_layers(checkpoint.model)
    tokens = VisualTokens(
        roles,
        scopes,
        ROLES.index(Role.SYSTEM),
        lambda layer: families.reach(checkpoint.model, roles, [layer])[0],
        follow,
    )

    def visual(layer: int, *block) -> None:
        if not crossed or layer in (crossed if layers is None else crossed & set(layers)):
            tokens(layer, *block)

    asked = query_mask(roles, "+".join(scopes))
    with probe(roles, queries=asked, layers=None if crossed else layers, of=ROLES, visual=visual) as record:
        checkpoint.model(**answers.inputs, **attention_only(checkpoint.model))
    masses, measured_layers = families.masses(checkpoint.model, record, ROLES)
    if crossed and layers is not None:
        kept = [row for row, layer in enumerate(measured_layers) if layer in layers]
        masses, measured_layers = masses[kept], [measured_layers[row] for row in kept]
    reach = families.reach(checkpoint.model, roles, measured_layers)
    results = []
    for b in range(roles.shape[0]):
        if not (roles[b] == Role.VISUAL).any():
            results.append(Measured([], measured_layers, None, "no image"))
            continue
        records = []
        for name in scopes:
            queries = query_mask(roles[b : b + 1], name)[0]
            if not queries.any():
                continue
            reached = reach[:, b, queries]
            has_vas = bool((roles[b] == Role.SYSTEM).any() and reached.any())
            records.append(_record(name, masses[:, b, :, queries], reached, has_vas))
            if not crossed:
                border = borders[b] if borders is not None else None
                records[-1] |= _sinks(tokens, b, name, sink_share, border, has_vas)
        problem = None if records else f"no queries in the {scope} scope"
        results.append(Measured(records, measured_layers, tokens.steps(b) if b in follow else None, problem))
    return results


def _record(scope: str, masses: torch.Tensor, reach: torch.Tensor, has_vas: bool) -> dict:
    """One sample in one scope as plain lists. masses: [L, H, n, R] of its queries; reach: bool [L, n].

    Without a system turn that a query reaches there is no VAS: `vas`, `head_mean` and `by_query` are None.
    """
    visual, system, user, response = masses.double().unbind(-1)
    vas = sample_vas(visual, system, reach)
    by_position = torch.stack([visual, system, user, response]).mean((1, 2)).float()  # [4, n]
    return {
        "scope": scope,
        "queries": vas.queries,
        "reached": vas.reached.tolist(),
        "vas": vas.ratio.flatten().tolist() if has_vas else None,
        "visual": vas.visual.flatten().tolist(),
        "system": vas.system.flatten().tolist(),
        "user": user.mean(-1).flatten().tolist(),
        "response": response.mean(-1).flatten().tolist(),
        "head_mean": vas.head_mean.tolist() if has_vas else None,
        "by_query": vas.by_query.float().tolist() if has_vas else None,
        "positions": by_position.tolist(),
    }


def _sinks(tokens: VisualTokens, b: int, scope: str, share: float, border: np.ndarray | None, has_vas: bool) -> dict:
    """Figures without the sample's sinks, and without the visual tokens on its border."""
    shares = tokens.shares(b, scope)
    total = float(shares.mass.sum())

    def figures(name: str, dropped: np.ndarray) -> dict:
        rest = shares.without(dropped)
        taken = 1 - rest["visual"] / total if total else 0.0
        if not has_vas:
            rest |= {"vas": None, "head_mean": None}
        return {f"{name}_tokens": int(dropped.sum()), f"{name}_share": taken} | {
            f"{name}_free_{key}": value for key, value in rest.items()
        }

    found = figures("sink", tokens.sinks(b, share))
    return found | figures("border", border) if border is not None else found
