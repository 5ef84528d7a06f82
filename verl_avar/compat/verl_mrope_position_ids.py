"""M-RoPE position ids stay [4, T] per sample when all sequences of a batch have the same length.

Why: position ids of a Qwen-VL batch are a nested tensor of [B, 4, T_b], ragged in T. After a transfer (TransferQueue,
pickling) of samples of one length the ragged dimension comes back as the 4; verl then sets `_ragged_idx = 2` on it,
which leaves lengths and values contradicting each other. We rebuild the tensor from its values.
Where: verl/utils/tensordict_utils.py:910, `maybe_fix_3d_position_ids`.
Versions: verl 0.9.1 (with tensordict 0.10, TransferQueue 0.1.11). On GPU too.
Can go: when a batch of equal lengths survives `tq.kv_batch_put`/`get` with ragged dimension 2.
"""

from __future__ import annotations

from contextlib import contextmanager

from verl_avar.compat.on_import import on_import


def apply() -> None:
    """Replace the function before the modules that import it by name."""
    on_import("verl.utils.tensordict_utils", patch)


@contextmanager
def patch(module):
    yield
    module.maybe_fix_3d_position_ids = fix_3d_position_ids


def fix_3d_position_ids(data) -> None:
    """Make `data["position_ids"]`, if it is nested with 3 dimensions, ragged in the last one, in place."""
    import torch

    positions = data.get("position_ids", None)
    if positions is None or not positions.is_nested or positions.dim() != 3:
        return
    offsets = data["input_ids"].offsets()
    values = _values(positions.values(), offsets.diff().tolist())
    data["position_ids"] = torch.nested.nested_tensor_from_jagged(values, offsets, jagged_dim=2)


def _values(values, lengths: list[int]):
    """Position ids [4, sum T_b], out of a nested tensor whose metadata can't be trusted but whose values can."""
    if values.shape[-1] == sum(lengths):
        return values
    if values.shape == (4 * len(lengths), lengths[0]) and len(set(lengths)) == 1:  # ragged in the 4: [B * 4, T]
        return values.reshape(len(lengths), 4, lengths[0]).transpose(0, 1).reshape(4, -1)
    raise ValueError(f"position_ids: values of shape {tuple(values.shape)} for sequences of lengths {lengths[:8]}")
