"""What the worker knows of each KV-cache slot: role and bias of its token, and the score of its query.

Keeping roles in slot space, not per request, leaves prefix caching, preemption, chunked prefill and continuous
batching to vLLM: whoever reads a slot reads its role, and whoever gets a block rewrites it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from verl_avar.reward import token_scores
from verl_avar.roles import Role
from verl_avar.rollout.options import RequestOptions


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


class SlotState:
    """role uint8 [slots], bias float32 [blocks, 2], scores float32 [slots, 4] (see `scores`)."""

    def __init__(self, blocks: int, block_size: int, scores: np.ndarray):
        self.block_size = block_size
        self.roles = torch.zeros(blocks * block_size, dtype=torch.uint8)
        self.bias = torch.zeros(blocks, 2)
        self.scores = torch.from_numpy(scores)

    def mark(self, marks: BlockMarks) -> None:
        if not marks.blocks:
            return
        blocks = torch.from_numpy(np.concatenate(marks.blocks))
        self.roles.view(-1, self.block_size)[blocks] = torch.from_numpy(np.concatenate(marks.roles))
        self.bias[blocks] = torch.from_numpy(np.concatenate(marks.bias))

    def indicator(self, slots: torch.Tensor) -> torch.Tensor:
        """One 0/1 column per scored role. slots: [...]. Returns float32 [..., 2] (visual, system)."""
        roles = self.roles[slots]
        return torch.stack((roles == Role.VISUAL, roles == Role.SYSTEM), dim=-1).float()

    def add_scores(self, slots: torch.Tensor, masses: torch.Tensor) -> None:
        """Adds one layer's scores of the queries at `slots` [tokens]; masses: [tokens, 2] (visual, system)."""
        visual, system = masses.T[:, None, None]  # one layer, heads averaged already
        self.scores.index_add_(0, slots, token_scores(visual, system).T)

    def bias_of(self, slots: torch.Tensor) -> torch.Tensor:
        """The bias of the requests that own these slots. slots: [...]. Returns float32 [..., 2]."""
        return self.bias[slots // self.block_size]
