"""Between the three shapes of a batch: nested rows (verl's), padded [B, T] and packed [1, sum T_b] (the model's)."""

from __future__ import annotations

import torch
from torch import nn


def pad_rows(rows: torch.Tensor) -> torch.Tensor:
    """Nested [B, T_b] to padded [B, T], T = max T_b, zeros on the right."""
    lengths = rows.offsets().diff()  # torch alone may pad to the sum of the lengths
    return torch.nested.to_padded_tensor(rows, padding=0, output_size=(len(lengths), int(lengths.max())))


def within(rows: torch.Tensor) -> torch.Tensor:
    """Where the padded [B, T] of nested rows holds tokens: bool."""
    lengths = rows.offsets().diff()
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]


def full_length_mask(mask: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """A response mask as long as its sequences, nested.

    verl's SFT masks whole sequences [B, T_b]; its RL masks the response alone, which ends the sequence.
    Raises ValueError for a mask longer than its sequence.
    """
    rows = list(mask.unbind())
    if any(len(row) > length for row, length in zip(rows, lengths, strict=True)):
        raise ValueError(f"loss_mask of {[len(row) for row in rows]} tokens for sequences of {lengths}")
    rows = [nn.functional.pad(row, (length - len(row), 0)) for row, length in zip(rows, lengths, strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def pack(rows: torch.Tensor, lengths: list[int], extra: int = 0) -> torch.Tensor:
    """Padded [B, T] to one row [1, sum(lengths) + extra], zeros at the end."""
    packed = torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])
    return nn.functional.pad(packed, (0, extra))[None]


def unpack(mass: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Masses [L, 1, H, total] of a packed row to [L, B, H, T], zeros on the right. total may exceed sum(lengths)."""
    parts = mass[:, 0, :, : sum(lengths)].split(lengths, dim=-1)
    return torch.stack([nn.functional.pad(part, (0, max(lengths) - part.shape[-1])) for part in parts], dim=1)
