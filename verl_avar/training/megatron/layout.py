"""Per-token rows as megatron's layers see them, and masses back in the padded form of the rest of AVAR.

verl's own functions lay rows out, so that roles lie where the input ids do: padded to a common length (`bshd`), or
packed with each sequence padded to what the parallel ranks share (`thd`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Layout:
    """How one micro-batch lies in the layers. lengths: of its samples; starts: in a packed row, None where padded."""

    lengths: list[int]
    starts: list[int] | None

    def padded(self, mass: torch.Tensor) -> torch.Tensor:
        """Masses [L, 1, H, total] or [L, B, H, T'] of the layers to [L, B, H, T], T the longest sample."""
        longest = max(self.lengths)
        if self.starts is None:
            return mass[..., :longest]
        rows = [mass[:, 0, :, start : start + n] for start, n in zip(self.starts, self.lengths, strict=True)]
        return torch.stack([nn.functional.pad(row, (0, longest - row.shape[-1])) for row in rows], dim=1)


def lay_out(
    rows: dict[str, torch.Tensor], packed: bool, forced_length: int | None = None, bucket: int | None = None
) -> tuple[dict[str, torch.Tensor], Layout]:
    """Nested rows [B, T_b] as the layers see them, [1, total] where packed, else [B, T'], zeros between; and how.

    forced_length, bucket: verl's `forced_max_seqlen` and `pad_to_length_bucket` of the micro-batch.
    """
    from verl.models.mcore.util import preprocess_bshd_engine, preprocess_thd_engine

    seen, starts = {}, None
    for name, row in rows.items():
        if packed:
            seen[name], params, _ = preprocess_thd_engine(row, pad_to_length_bucket=bucket)
            starts = params.cu_seqlens_q_padded[:-1].tolist()
        else:
            seen[name] = preprocess_bshd_engine(row, forced_max_seqlen=forced_length)[0]
    lengths = next(iter(rows.values())).offsets().diff().tolist()
    return seen, Layout(lengths, starts)
