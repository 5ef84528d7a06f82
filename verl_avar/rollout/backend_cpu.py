"""CPU attention backend: vLLM's own kernel with the roles riding in the KV cache.

A head's cache is a few columns wider than its size D:
- keys end in the role indicators and queries in the bias, so that `q·k` is the biased logit;
- values end in the role indicators, so that the output's extra columns are the masses (`softmax(QKᵀ)·1_R`, AVAR §2).
One call of the stock kernel then gives output and masses, whatever its blocking, splitting and instruction set.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl, CPUAttentionMetadata

from verl_avar.rollout.layer import LinkedAttention, refuse, unlinked
from verl_avar.rollout.slots import SlotState

RIDERS = 4  # key columns: indicators of VISUAL and SYSTEM, twice


def ridden_head_size(head_size: int) -> int:
    """The smallest head size with room for the riders that the stock kernel has a fast variant of (multiples of 32).

    Raises NotImplementedError where there is none.
    """
    sizes = [size for size in CPUAttentionBackend.get_supported_head_sizes() if size % 32 == 0]
    wide = [size for size in sizes if size >= head_size + RIDERS]
    if not wide:
        raise NotImplementedError(
            f"verl_avar.rollout: heads of {head_size} are too large for scores and biases on a CPU (at most "
            f"{max(sizes) - RIDERS}); run this model without its kv_transfer_config"
        )
    return min(wide)


@dataclass
class Riders:
    """One step's extra columns, in the dtype of the model: query [tokens, 1, W], key and value [tokens, 1, W]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    @classmethod
    def of(cls, state: SlotState, slots: torch.Tensor, width: int, scale: float, dtype: torch.dtype) -> Riders:
        """slots: int64 [tokens], where each token's own key lies. width: W >= RIDERS."""
        bias = state.bias_of(slots) / scale
        coarse = bias.to(dtype)
        # What half precision rounds off the bias goes with the second pair of columns.
        fine = (bias - coarse.float()).to(dtype)
        indicator = state.indicator(slots).to(dtype)
        query, key, value = torch.zeros(3, len(slots), 1, width, dtype=dtype)
        query[:, 0, :RIDERS] = torch.cat((coarse, fine), dim=1)
        key[:, 0, :RIDERS] = torch.cat((indicator, indicator), dim=1)
        value[:, 0, :2] = indicator
        return cls(query, key, value)


def _ride(rows: torch.Tensor, riders: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, D] and [tokens, 1, W] -> [tokens, heads, D + W]."""
    return torch.cat((rows, riders.expand(-1, rows.shape[1], -1)), dim=-1)


class RoleAttentionBackend(CPUAttentionBackend):
    forward_includes_kv_cache_update = True  # the riders of a step are made once, with its metadata

    @staticmethod
    def get_impl_cls() -> type[RoleAttention]:
        return RoleAttention


class RoleAttention(LinkedAttention, CPUAttentionBackendImpl):
    """One layer's attention."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others,
    ) -> None:
        refuse(
            attn_type,
            kv_cache_dtype,
            alibi_slopes=alibi_slopes,
            sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap or None,
            kv_sharing=kv_sharing_target_layer_name,
            **others,
        )
        self.plain_head_size = head_size
        super().__init__(
            num_heads, ridden_head_size(head_size), scale, num_kv_heads, None, None, kv_cache_dtype, None, attn_type
        )

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query, output: [tokens, H, D]; key, value: [tokens, H_kv, D]. Leaves the masses with the slots."""
        if attn_metadata is None:  # vLLM's profiling run
            return output
        if self.slots is None:
            raise unlinked()
        state, slot_mapping = self.slots.state, attn_metadata.slot_mapping
        tokens, size = len(slot_mapping), self.plain_head_size
        riders = state.of_step("riders", lambda: self._riders(slot_mapping, query.dtype))
        wide = torch.empty(tokens, self.num_heads, self.head_size, dtype=output.dtype)
        fresh = _ride(key[:tokens], riders.key), _ride(value[:tokens], riders.value)
        super().do_kv_cache_update(layer, *fresh, kv_cache, slot_mapping)
        ridden = _ride(query[:tokens], riders.query)
        super().forward(layer, ridden, *fresh, kv_cache, attn_metadata, wide, output_scale, output_block_scale)
        output[:tokens] = wide[..., :size]
        if self.slots.masses is not None:
            self.slots.masses[:tokens] = wide[..., size : size + 2]
        if self.slots.last:
            state.finish(slot_mapping)
        return output

    def _riders(self, slot_mapping: torch.Tensor, dtype: torch.dtype) -> Riders:
        width = self.head_size - self.plain_head_size
        return Riders.of(self.slots.state, slot_mapping.long(), width, self.scale, dtype)
