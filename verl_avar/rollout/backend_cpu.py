"""CPU attention backend: vLLM's own kernel with the roles riding in the KV cache.

A head's cache is a few columns wider than its size D:
- keys end in the role indicators and queries in the bias, so that `q·k` is the biased logit;
- values end in the role indicators, so that the output's extra columns are the masses (`softmax(QKᵀ)·1_R`, AVAR §2).
One call of the stock kernel then gives output and masses, whatever its blocking, splitting and instruction set.
"""

from __future__ import annotations

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl, CPUAttentionMetadata

from verl_avar.rollout.layer import LinkedAttention, refuse, unlinked
from verl_avar.rollout.slots import SlotState

RIDERS = 4  # key columns: indicators of VISUAL and SYSTEM, twice


def ridden_head_size(head_size: int, isa: str) -> int:
    """The smallest head size with room for the riders that the stock kernel has a variant of as fast as the model's.

    isa: the instructions that the stock kernel would use for the model's own heads (vLLM's `_get_attn_isa`). Vector
    instructions take multiples of 16, matrix instructions (AMX, NEON's) only multiples of 32.
    Raises NotImplementedError where there is none.
    """
    step = 16 if isa in ("vec", "vec16") else 32
    sizes = [size for size in CPUAttentionBackend.get_supported_head_sizes() if size % step == 0]
    wide = [size for size in sizes if size >= head_size + RIDERS]
    if not wide:
        raise NotImplementedError(
            f"verl_avar.rollout: heads of {head_size} are too large for scores and biases on a CPU (at most "
            f"{max(sizes) - RIDERS}); run this model without its kv_transfer_config"
        )
    return min(wide)


class RiddenRows:
    """The rows of a step as the kernel takes and makes them: query and output [tokens, H, D + W], key and value
    [tokens, H_kv, D + W], in the dtype of the model. Every layer writes its own first D columns; the riders are those
    of all layers.

    They lie in `buffers`, which an engine makes once (`RiddenRows.buffers`): fresh memory costs more than the copy.
    """

    def __init__(self, buffers: list[torch.Tensor], size: int, state: SlotState, slots: torch.Tensor, scale: float):
        """size: D. slots: int64 [tokens], where each token's own key lies. scale: of the logits."""
        rows = [buffer[: len(slots)] for buffer in buffers]
        self.query, self.key, self.value, self.output = rows
        self.plain_inputs = [row[..., :size] for row in rows[:3]]
        self.plain_output = self.output[..., :size]
        self.masses = self.output[..., size : size + 2]
        bias = (state.bias_of(slots) / scale)[:, None]
        coarse = self.query[..., size : size + 2]
        coarse.copy_(bias)
        indicator = state.indicator(slots)[:, None]
        self.key[..., size : size + 2] = indicator
        self.value[..., size : size + 2] = indicator
        if coarse.dtype != bias.dtype:
            # What half precision rounds off the bias goes with the second pair of columns.
            self.query[..., size + 2 : size + RIDERS] = bias - coarse.to(bias.dtype)
            self.key[..., size + 2 : size + RIDERS] = indicator

    @staticmethod
    def buffers(tokens: int, heads: int, kv_heads: int, ridden_size: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """For at most `tokens` tokens: query, key, value, output."""
        return [torch.zeros(tokens, n, ridden_size, dtype=dtype) for n in (heads, kv_heads, kv_heads, heads)]


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
        config = get_current_vllm_config()
        isa = cpu_attn._get_attn_isa(config.model_config.dtype, config.cache_config.block_size, head_size)
        ridden = ridden_head_size(head_size, isa)
        self.plain_head_size = head_size
        super().__init__(num_heads, ridden, scale, num_kv_heads, None, None, kv_cache_dtype, None, attn_type)

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
        tokens = slot_mapping.shape[0]
        rows = state.of_step("rows", lambda: self._rows(slot_mapping, query.dtype))
        for ridden, given in zip(rows.plain_inputs, (query, key, value), strict=True):
            ridden.copy_(given[:tokens])
        super().do_kv_cache_update(layer, rows.key, rows.value, kv_cache, slot_mapping)
        inputs = rows.query, rows.key, rows.value
        super().forward(layer, *inputs, kv_cache, attn_metadata, rows.output, output_scale, output_block_scale)
        output[:tokens] = rows.plain_output
        if self.slots.masses is not None:
            self.slots.masses[:tokens] = rows.masses
        if self.slots.last:
            state.finish(slot_mapping)
        return output

    def _rows(self, slot_mapping: torch.Tensor, dtype: torch.dtype) -> RiddenRows:
        state = self.slots.state
        sizes = self.num_heads, self.num_kv_heads, self.head_size
        buffers = state.of_engine("rows", lambda: RiddenRows.buffers(state.masses.shape[1], *sizes, dtype))
        return RiddenRows(buffers, self.plain_head_size, state, slot_mapping.long(), self.scale)
