"""CPU attention backend: vLLM's paged decoder attention with role bias and per-query scores, in torch.

Its KV layout, cache update and metadata are its own (upstream's change between 0.24 and 0.27). Built by
`backend_choice` for engines with our connector, which gives every layer its `SlotState`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)

from verl_avar.rollout.paged_attention import Tile, attend, plan_tiles
from verl_avar.rollout.slots import SlotState


class RoleAttentionBackend(AttentionBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"  # vLLM looks the name up among its own backends

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @staticmethod
    def get_impl_cls() -> type[RoleAttention]:
        return RoleAttention

    @staticmethod
    def get_builder_cls() -> type[RoleAttentionMetadataBuilder]:
        return RoleAttentionMetadataBuilder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        return num_blocks, block_size, num_kv_heads, 2 * head_size

    @staticmethod
    def use_cascade_attention(*args, **kwargs) -> bool:
        return False


@dataclass
class RoleAttentionMetadata:
    """One step's batch. query_start: [R+1], seq_lens: [R], block_table: [R, blocks], slot_mapping: [tokens]."""

    query_start: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    # Made by the step's first layer: the slots' roles arrive after this metadata is built.
    tiles: list[Tile] | None = None


class RoleAttentionMetadataBuilder(AttentionMetadataBuilder[RoleAttentionMetadata]):
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> RoleAttentionMetadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise NotImplementedError("verl_avar.rollout: attention that is not causal is not supported")
        return RoleAttentionMetadata(
            query_start=common.query_start_loc[: common.num_reqs + 1],
            seq_lens=common.seq_lens[: common.num_reqs],
            block_table=common.block_table_tensor[: common.num_reqs],
            slot_mapping=common.slot_mapping[: common.num_actual_tokens],
        )


class RoleAttention(AttentionImpl):
    """One layer's attention. `state` is set by the connector once the KV cache exists."""

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
        **unsupported,
    ) -> None:
        unsupported |= {
            "alibi_slopes": alibi_slopes,
            "sliding_window": sliding_window,
            "logits_soft_cap": logits_soft_cap or None,
            "kv_sharing": kv_sharing_target_layer_name,
            f"attention type {attn_type}": attn_type != AttentionType.DECODER,
            f"KV cache of type {kv_cache_dtype}": kv_cache_dtype not in ("auto", "float32", "bfloat16", "float16"),
        }
        if asked := [name for name, value in unsupported.items() if value is not None and value is not False]:
            raise NotImplementedError(
                f"verl_avar.rollout: this model's attention uses {', '.join(asked)}, which the visual-attention "
                "backend does not support; run this model without its kv_transfer_config"
            )
        self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self.state: SlotState | None = None

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """key, value: [tokens, H_kv, D] -> their slots; padding tokens have slot -1."""
        slots = slot_mapping.long()
        fresh = torch.cat((key[: len(slots)], value[: len(slots)]), dim=-1)
        if (kept := slots >= 0).logical_not().any():
            slots, fresh = slots[kept], fresh[kept]
        kv_cache.view(-1, self.num_kv_heads, 2 * self.head_size)[slots] = fresh

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: RoleAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query, output: [tokens, H, D]. Adds this layer's scores to the queries' slots."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("verl_avar.rollout: fused output quantization is not supported")
        if attn_metadata is None:  # vLLM's profiling run
            return output
        meta, state = attn_metadata, self.state
        if state is None:
            raise RuntimeError("verl_avar.rollout: a layer ran before the connector had registered its KV cache")
        slots = meta.slot_mapping.long()
        if meta.tiles is None:
            heads = self.num_heads, self.num_kv_heads
            meta.tiles = plan_tiles(meta.query_start, meta.seq_lens, meta.block_table, slots, state, *heads)
            state.scores[slots] = 0
        cache = kv_cache.view(-1, self.num_kv_heads, 2 * self.head_size)
        masses = torch.zeros(len(slots), 2)
        for tile in meta.tiles:
            attend(query, cache, tile, self.scale, output, masses)
        state.add_scores(slots, masses)
        return output
