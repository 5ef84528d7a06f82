"""What the worker knows of each KV-cache slot: role and bias of its token, and the score of its query.

Keeping roles in slot space, not per request, leaves prefix caching, preemption, chunked prefill and continuous
batching to vLLM: whoever reads a slot reads its role, and whoever gets a block rewrites it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from verl_avar.reward import head_sums, layer_scores
from verl_avar.roles import Role
from verl_avar.rollout.options import RequestOptions

T = TypeVar("T")
ID_BYTES, BIAS_BYTES = 8, 8  # of a block's int64 id and its two float32 biases


@dataclass
class BlockMarks:
    """Blocks that requests were given in one step: ids [N], roles uint8 [N, block_size], bias float32 [N, 2]
    (visual, system)."""

    blocks: list[np.ndarray] = field(default_factory=list)
    roles: list[np.ndarray] = field(default_factory=list)
    bias: list[np.ndarray] = field(default_factory=list)

    def add(
        self, blocks: list[int], first: int, prompt_roles: np.ndarray, options: RequestOptions, block_size: int
    ) -> None:
        """Marks a request's blocks number `first` and on; past its prompt every token is a RESPONSE."""
        roles = np.full(len(blocks) * block_size, Role.RESPONSE, dtype=np.uint8)
        start = first * block_size
        prompt = prompt_roles[start : start + len(roles)]
        roles[: len(prompt)] = prompt
        self.blocks.append(np.asarray(blocks, dtype=np.int64))
        self.roles.append(roles.reshape(len(blocks), block_size))
        self.bias.append(np.tile(np.float32([options.visual_bias, options.system_bias]), (len(blocks), 1)))

    def packed(self) -> np.ndarray:
        """All of it as bytes, for one copy to the device: ids, then biases, then roles. Returns uint8 [bytes]."""
        return np.concatenate(
            [np.concatenate(part).view(np.uint8).ravel() for part in (self.blocks, self.bias, self.roles)]
        )


class SlotState:
    """One rank's knowledge of its slots, in tensors that keep their place: a CUDA graph may hold on to them.

    roles uint8 [slots]; bias float32 [blocks, 2] (visual, system); masses float32 [layers, max_tokens, H, 2] (visual,
    system), of the probed layers and this rank's heads, rewritten by every step.

    scores: float32 [slots + 1, 5] (`reward.SCORES`), the last row for padding; None on ranks that only share masses.
    total_heads: query heads of all ranks. all_reduce: sums a tensor over the ranks, where there are several.
    """

    def __init__(
        self,
        blocks: int,
        block_size: int,
        layers: int,
        max_tokens: int,
        heads: int,
        scores: torch.Tensor | None,
        *,
        total_heads: int | None = None,
        all_reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
        device: torch.device | str = "cpu",
    ):
        self.block_size = block_size
        self.total_heads = total_heads or heads
        self.all_reduce = all_reduce
        self.scores = scores
        self.roles = torch.zeros(blocks * block_size, dtype=torch.uint8, device=device)
        self.bias = torch.zeros(blocks, 2, device=device)
        self.masses = torch.zeros(layers, max_tokens, heads, 2, device=device)
        self._step: dict[str, Any] = {}
        self._engine: dict[str, Any] = {}

    def begin(self, marks: BlockMarks) -> None:
        """Starts a step: writes roles and biases of the blocks that were given out for it."""
        self._step.clear()
        if not marks.blocks:
            return
        packed = torch.from_numpy(marks.packed())
        # In stream order, and without waiting: of memory that isn't pinned CUDA takes a copy before the call returns.
        packed = packed.to(self.roles.device, non_blocking=True)
        n = len(packed) // (ID_BYTES + BIAS_BYTES + self.block_size)
        blocks, bias, roles = packed.split((n * ID_BYTES, n * BIAS_BYTES, n * self.block_size))
        blocks = blocks.view(torch.int64)
        self.bias[blocks] = bias.view(torch.float32).view(n, 2)
        self.roles.view(-1, self.block_size)[blocks] = roles.view(n, self.block_size)

    def of_step(self, name: str, make: Callable[[], T]) -> T:
        """What `make` returns, made by the first layer of a step and kept for the others."""
        if name not in self._step:
            self._step[name] = make()
        return self._step[name]

    def of_engine(self, name: str, make: Callable[[], T]) -> T:
        """What `make` returns, made once: where a backend's layers keep the buffers that they share."""
        if name not in self._engine:
            self._engine[name] = make()
        return self._engine[name]

    def finish(self, slot_mapping: torch.Tensor) -> None:
        """Ends a step: writes the scores of its queries, whose slots are slot_mapping [tokens] (-1: padding).

        The heads of all ranks are added up in one all-reduce for all layers.
        """
        masses = self.masses[:, : len(slot_mapping)].movedim(2, 1)  # [L, H, tokens, 2]
        sums = head_sums(*masses.unbind(-1))
        if self.all_reduce is not None:
            sums = self.all_reduce(sums)
        if self.scores is None:
            return
        slots = slot_mapping.long()
        slots = slots.masked_fill(slots < 0, len(self.roles))
        self.scores.index_copy_(0, slots, layer_scores(sums / self.total_heads).T)

    def indicator(self, slots: torch.Tensor) -> torch.Tensor:
        """One 0/1 column per scored role. slots: [...]. Returns float32 [..., 2] (visual, system)."""
        roles = self.roles[slots]
        return torch.stack((roles == Role.VISUAL, roles == Role.SYSTEM), dim=-1).float()

    def bias_of(self, slots: torch.Tensor) -> torch.Tensor:
        """The bias of the requests that own these slots. slots: [...]. Returns float32 [..., 2]."""
        return self.bias[slots // self.block_size]
