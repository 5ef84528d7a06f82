"""GPU attention backend: the Triton kernels of `triton_attention` behind vLLM's interface, vLLM 0.24 to 0.33.

Nothing of vLLM's own backends is used, whose layouts differ between these versions: ours is the cache
[blocks, H_kv, block_size, 2·D] (keys, then values) that lies in memory as [blocks, block_size, H_kv, 2·D].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)

from verl_avar.rollout import requested
from verl_avar.rollout.layer import LinkedAttention, refuse
from verl_avar.rollout.triton_attention import Workspace, paged_attention, write_cache

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
OLDEST_GPU = DeviceCapability(8, 0)  # bfloat16 and asynchronous copies


@dataclass
class PagedRoleMetadata(AttentionMetadata):
    """One step for all layers. In a CUDA graph the tensors keep their places and only their contents change.

    tokens: rows of the step, padding included where the step runs as a full graph. max_query_len: what the launch is
    chosen by; an upper bound. query_start int32 [requests + 1], seq_lens int32 [requests], block_table int32
    [requests, blocks], slot_mapping int64 [tokens] (-1: padding).
    """

    tokens: int
    max_query_len: int
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    workspace: Workspace


class PagedRoleMetadataBuilder(AttentionMetadataBuilder[PagedRoleMetadata]):
    # A graph is captured for each number of decoding requests. Not ALWAYS: a graph for any mix of queries would have to
    # be captured for the longest possible ones, and vLLM's newer model runner does not say so when it captures.
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec, layer_names: list[str], vllm_config, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if not requested(vllm_config):  # vLLM remembers a layer's backend by "has a KV connector", not by which one
            raise RuntimeError(
                "verl_avar.rollout: an earlier engine of this process asked for the visual-attention backend and this "
                "one, with another KV connector, was given it too: build them in two processes"
            )
        impl = vllm_config.compilation_config.static_forward_context[layer_names[0]].impl
        requests = vllm_config.scheduler_config.max_num_seqs
        self.workspace = Workspace.allocate(requests, impl.num_heads, impl.head_size, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> PagedRoleMetadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise NotImplementedError("verl_avar.rollout: non-causal attention is not supported")
        self.workspace.refresh()
        return PagedRoleMetadata(
            tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping[: common.num_actual_tokens],
            workspace=self.workspace,
        )


class PagedRoleBackend(AttentionBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = list(DTYPES.values())
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", *DTYPES]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # vLLM looks the name up among its own; this one is for others

    @staticmethod
    def get_impl_cls() -> type[PagedRoleAttention]:
        return PagedRoleAttention

    @staticmethod
    def get_builder_cls() -> type[PagedRoleMetadataBuilder]:
        return PagedRoleMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(range(32, 257, 16))

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return capability >= OLDEST_GPU

    @classmethod
    def supports_combination(
        cls, head_size: int, dtype: torch.dtype, kv_cache_dtype: str | None, *others: Any, **more: Any
    ) -> str | None:
        if DTYPES.get(kv_cache_dtype or "auto", dtype) != dtype:
            return f"KV cache of type {kv_cache_dtype} under a model of type {dtype} not supported"
        return None

    # vLLM 0.24 to 0.27 ask for shape and order in memory; 0.33 has one shape and asks which orders we read.

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        return num_blocks, num_kv_heads, block_size, 2 * head_size

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        if include_num_layers_dimension:
            raise NotImplementedError("verl_avar.rollout: every layer has a KV cache of its own")
        return 0, 2, 1, 3

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple:
        from vllm.v1.kv_cache_interface import KVCacheLayout

        return KVCacheLayout.LBNHC, KVCacheLayout.BLNHC  # layers apart, or side by side in each block


class PagedRoleAttention(LinkedAttention, AttentionImpl):
    """One layer's attention."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
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
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: PagedRoleMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query, output: [rows, H, D]; key, value: [rows, H_kv, D]; rows past the step's tokens are left alone.

        Everything here is enqueued on the current stream, reads no tensor on the host and writes to tensors that keep
        their places: captured in a CUDA graph, it does the same for later steps. Padding writes no key and no value,
        and its score goes to the trash row.
        """
        if attn_metadata is None:  # vLLM's profiling run
            return output.fill_(0)
        step, tokens = attn_metadata, attn_metadata.tokens
        cache, masses = kv_cache.transpose(1, 2), None
        if self.slots is not None:
            roles, bias, masses = self.slots.state.roles, self.slots.state.bias, self.slots.masses
        else:  # vLLM captures graphs on a small cache to see what they cost, before the connector has the real one
            roles = torch.zeros(cache.shape[0] * cache.shape[1], dtype=torch.uint8, device=cache.device)
            bias = torch.zeros(cache.shape[0], 2, device=cache.device)
        if masses is not None and len(masses) < tokens:
            raise RuntimeError(f"verl_avar.rollout: a step of {tokens} tokens, room for the masses of {len(masses)}")
        write_cache(key, value, cache, step.slot_mapping)
        paged_attention(
            query[:tokens],
            cache,
            step.block_table,
            step.query_start,
            step.seq_lens,
            step.slot_mapping,
            roles,
            bias,
            output[:tokens],
            masses,
            scale=self.scale,
            max_query_len=step.max_query_len,
            workspace=step.workspace,
        )
        if self.slots is not None and self.slots.last:
            self.slots.state.finish(step.slot_mapping)
        return output
