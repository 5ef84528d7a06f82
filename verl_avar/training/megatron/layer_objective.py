"""AGTO inside the layers of megatron-core (AVAR §3.2).

AGTO is a mean over layers and heads of one term each, so every layer of every tensor-parallel rank can send back the
gradient of its own part; only the parts' values, two scalars a micro-batch, are reduced over the ranks. The part is
attached to the layer's attention output, which passes on unchanged. That is exact under megatron-core's reentrant
recomputation, whose first pass has no graph: the recomputed layer attaches its part again, and its backward
pass runs it.

    with probe(roles, queries, layers) as record:
        with layer_objective(LayerObjective(record, terms, alpha, beta, totals, layers=28, group=tp_group)) as agto:
            loss = agto.join(loss_of(model(...)))
            loss.backward()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from verl_avar.attention.record import Record
from verl_avar.objective import AgtoTerms
from verl_avar.roles import Role


@dataclass(eq=False)
class LayerObjective:
    """AGTO of one micro-batch. Serves one forward and one backward pass.

    terms: `agto_terms` of the micro-batch for one layer's masses, visual and system [1, B, H_local, T] as `record` has
    the tokens. totals: samples of the whole mini-batch that have the enhance and the suppress term. layers: how many
    layers report. group: the tensor-parallel group, whose ranks hold equal numbers of heads; None for one rank.
    """

    record: Record
    terms: Callable[[torch.Tensor, torch.Tensor], AgtoTerms]
    alpha: float
    beta: float
    totals: tuple[int, int]
    layers: int
    group: Any = None
    weight: torch.Tensor | None = None  # d(what is differentiated) / d(this objective), known once backward has begun
    _sums: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> the two sums, over this rank's heads

    @property
    def share(self) -> float:
        """Part of the mean over layers and heads that one layer of this rank is."""
        ranks = 1 if self.group is None else torch.distributed.get_world_size(self.group)
        return 1.0 / (self.layers * ranks)

    def attach(self, output: torch.Tensor, mass: torch.Tensor, layer: int) -> torch.Tensor:
        """The output, unchanged, with this layer's part attached. mass: [B, H_local, T, R]."""
        visual, system = (mass[None, ..., self.record.of.index(role)] for role in (Role.VISUAL, Role.SYSTEM))
        terms = self.terms(visual, system)
        self._sums.setdefault(layer, torch.stack((terms.enhance_sum, terms.suppress_sum)).detach())
        part = terms.loss(self.alpha, self.beta, *self.totals) * self.share
        return _Attached.apply(output, part, self)

    def sums(self) -> torch.Tensor:
        """Sums over samples of L_enhance and L_suppress, means over all layers and heads: float32 [2].

        A collective call over the group. Raises RuntimeError where not every layer reported.
        """
        if len(self._sums) != self.layers:
            raise RuntimeError(f"AVAR: {self.layers} layers were to report masses, {sorted(self._sums)} did")
        sums = torch.stack(list(self._sums.values())).sum(0) * self.share
        if self.group is not None:
            torch.distributed.all_reduce(sums, group=self.group)
        return sums

    def value(self, sums: torch.Tensor) -> torch.Tensor:
        """α·L_enhance + β·L_suppress of these sums, divided by the totals: a scalar without a graph."""
        return AgtoTerms(*sums, *self.totals).loss(self.alpha, self.beta)

    def join(self, loss: torch.Tensor, value: torch.Tensor | None = None, scale: float = 1.0) -> torch.Tensor:
        """loss + scale · this objective. Whatever factor the sum is differentiated with reaches the layers' parts.

        value: that of `value`, if known already; else a collective call over the group.
        """
        return _Joined.apply(loss, self.value(self.sums()) if value is None else value, scale, self)


_objectives: list[LayerObjective] = []  # module state, as `record._records` is, for the same reason


@contextmanager
def layer_objective(objective: LayerObjective) -> Iterator[LayerObjective]:
    """Has measured layers attach their parts. Keep it open until the backward pass is done."""
    _objectives.append(objective)
    try:
        yield objective
    finally:
        _objectives.remove(objective)


class _Joined(torch.autograd.Function):
    """Adds the objective's value to the loss; its backward pass, the first to run, notes the factor."""

    @staticmethod
    def forward(ctx, loss, value, scale, objective):
        ctx.scale, ctx.objective = scale, objective
        return loss + scale * value.to(loss.dtype)

    @staticmethod
    def backward(ctx, grad):
        ctx.objective.weight = grad * ctx.scale
        return grad, None, None, None


class _Attached(torch.autograd.Function):
    """The first argument, with a gradient for the second."""

    @staticmethod
    def forward(ctx, output, part, objective):
        ctx.objective = objective
        return output

    @staticmethod
    def backward(ctx, grad):
        if (weight := ctx.objective.weight) is None:
            raise RuntimeError("AVAR: the backward pass began without the objective; add it with LayerObjective.join")
        return grad, weight.to(torch.float32), None
