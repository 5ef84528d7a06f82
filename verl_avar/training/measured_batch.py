"""What the engines of all backends share: a batch's roles, its samples, and scores as entries of verl's output."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from verl.utils.device import get_device_id

from verl_avar.objective import agto_counts
from verl_avar.roles import ChatTokens, query_mask, token_roles
from verl_avar.training.config import AvarConfig
from verl_avar.training.packing import full_length_mask, pad_rows, within

# Per-token entries of `model_output`, in the order of `reward.SCORES`.
OUTPUTS = ("visual_ratio", "visual_share", "visual_mass", "system_mass", "visual_vas")


class MeasuredBatch:
    """Mixin of an engine of verl. The engine sets `avar` and `chat`."""

    avar: AvarConfig
    chat: ChatTokens

    def _roles(self, data: TensorDict) -> torch.Tensor:
        """Roles of a batch, nested uint8 like its `input_ids`."""
        ids = data["input_ids"]
        written = full_length_mask(data["loss_mask"], ids.offsets().diff().tolist())
        padded, mask, written = pad_rows(ids), within(ids), pad_rows(written)
        # verl fills a batch with rows of end markers, without a turn to read (trainer/ppo/padding_utils.py)
        real = written.any(dim=-1) | (mask & (padded != padded[:, :1])).any(dim=-1)
        roles = torch.zeros_like(padded, dtype=torch.uint8)
        roles[real] = token_roles(padded[real], self.chat, attention_mask=mask[real], response_mask=written[real])
        return torch.nested.nested_tensor_from_jagged(roles[within(ids)], ids.offsets())

    def _count_samples(self, roles: torch.Tensor) -> tuple[int, int]:
        """Samples of the mini-batch, over all ranks, that have the enhance and the suppress term. roles: nested."""
        counts = torch.tensor(agto_counts(pad_rows(roles), self.avar.queries), device=get_device_id())
        torch.distributed.all_reduce(counts, group=self.get_data_parallel_group())
        return tuple(counts.tolist())

    def _token_outputs(self, scores: torch.Tensor, roles: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Scores [5, B, T] as entries of `model_output`, nested like `ids`; 0 outside of responses. roles: [B, T]."""
        scores = scores * query_mask(roles, "response")
        rows = (torch.nested.nested_tensor_from_jagged(score[within(ids)], ids.offsets()) for score in scores)
        return dict(zip(OUTPUTS, rows, strict=True))
