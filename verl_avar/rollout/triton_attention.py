"""Paged attention on a GPU that adds a role bias and returns role masses in the same pass (AVAR §2.2, §2.3).

arXiv:2603.03825. The kernels are in `triton_kernels`, the same in plain torch in `reference_attention`. What is
launched depends on shapes and on `max_query_len` alone, and nothing waits for the device: a step can be captured in a
CUDA graph and replayed with other lengths, blocks, roles and biases. No atomics: equal inputs give equal bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
import triton

from verl_avar.rollout import triton_kernels as kernels
from verl_avar.rollout.triton_cache import INTERPRETED, check_cache, form, packed, write_cache

__all__ = ["Plan", "Workspace", "paged_attention", "plan", "write_cache"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_SIZE = 256
MAX_SEGMENTS = 64
_PROGRAMS = 4  # per multiprocessor: what splitting keys aims at
_SPLIT_QUERIES = 64  # a longer prompt may have no more keys than queries, and is not worth a second kernel


@dataclass(frozen=True)
class Workspace:
    """What the kernels need beside a step's tensors; one serves all layers, which run one after another.

    parts: float32 [capacity, D] and sums: float32 [capacity, 4], where programs that share a request's keys leave their
    results. ride_rows: `triton_kernels.ride_table` by dtype. processors: the device's multiprocessors. hopper: whether
    the device has tensor cores that read shared memory (compute capability 9 and 10).
    """

    parts: torch.Tensor
    sums: torch.Tensor
    ride_rows: dict[torch.dtype, torch.Tensor]
    processors: int
    hopper: bool

    @classmethod
    def allocate(cls, requests: int, heads: int, head_size: int, device: torch.device | str) -> Workspace:
        """Buffers for steps of up to `requests` requests with `heads` query heads on this rank. At most 2.1 KiB · heads
        · head_size on a device of 132 multiprocessors, whatever the number of requests."""
        device = torch.device(device)
        processors, hopper = 8, False  # interpreted: as if it were a small GPU
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            processors, hopper = properties.multi_processor_count, properties.major in (9, 10)
        capacity = heads * min(_PROGRAMS * processors, MAX_SEGMENTS * requests)
        parts = torch.empty(capacity, head_size, dtype=torch.float32, device=device)
        sums = torch.empty(capacity, 4, dtype=torch.float32, device=device)
        return cls(parts, sums, {dtype: kernels.ride_table(dtype, device) for dtype in DTYPES}, processors, hopper)

    def refresh(self) -> None:
        """Writes the constants again, before every step: vLLM's sleep mode keeps the addresses of what was allocated
        with the KV cache and forgets the contents (vLLM 0.24 to 0.27 allocate a backend's buffers there). The rest of a
        workspace is written before it is read."""
        for dtype, rows in self.ride_rows.items():
            rows.copy_(_host_ride_table(dtype, rows.is_cuda), non_blocking=True)


@cache
def _host_ride_table(dtype: torch.dtype, pinned: bool) -> torch.Tensor:
    table = kernels.ride_table(dtype, "cpu")
    return table.pin_memory() if pinned else table


@dataclass(frozen=True)
class Plan:
    """One step's launch. rows: of a program, queries times the heads of a group. blocks: of such rows. one_block: no
    request has more. tile: keys at a time. segments: programs that share a request's keys; with 1, none do."""

    rows: int
    blocks: int
    one_block: bool
    tile: int
    segments: int
    warps: int
    stages: int


@lru_cache(maxsize=4096)
def plan(
    tokens: int,
    requests: int,
    max_query_len: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    processors: int,
    hopper: bool,
    capacity: int,
) -> Plan:
    """The launch of a step, from what the host knows without asking the device. tokens may count padding.

    Tile sizes are those whose registers don't spill and whose shared memory lets two or more programs share a
    multiprocessor, as compiled for compute capability 8.0 and 9.0.
    """
    group = heads // kv_heads
    size = triton.next_power_of_2(head_size)
    rows, stages = max(16, triton.next_power_of_2(group)), 3
    if dtype == torch.float32:  # without tensor cores: exact, not fast
        tile = 16
    elif max_query_len * group <= rows or (size > 128 and not hopper):
        # 5 stages: the next tile is on its way while one is computed, its block numbers before that.
        tile, stages = 32, 5 if size <= 128 else 3
    else:
        rows = max(64, rows)
        tile = 64 if size <= (128 if hopper else 64) else 32
    block_queries = rows // group
    one_block = max_query_len <= block_queries
    blocks = requests if one_block else tokens // block_queries + requests
    segments = 1
    if blocks * kv_heads <= processors and max_query_len <= _SPLIT_QUERIES:
        most = min(MAX_SEGMENTS, _PROGRAMS * processors // (blocks * kv_heads), capacity // (tokens * heads))
        segments = max(1, 1 << (most.bit_length() - 1)) if most else 1
    return Plan(rows, blocks, one_block, tile, segments, 8 if rows >= 128 else 4, stages)


def paged_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    slot_mapping: torch.Tensor,
    roles: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    masses: torch.Tensor | None,
    *,
    scale: float,
    max_query_len: int,
    workspace: Workspace,
) -> None:
    """Causal attention over a paged KV cache: logits are `query·key·scale + bias[slot of the query // block_size]` of
    the key's role; masses are the softmax weights summed over visual and over system keys.

    query: [T, H, D]. cache: [blocks, block_size, H_kv, 2·D], keys then values, this step's written already
    (`write_cache`). block_table: int32 [R, blocks of a request]. query_start: int32 [R+1], rows of each request; T may
    be more than its last (padding: those rows are left as they are). seq_lens: int32 [R], keys of each request, this
    step's included. slot_mapping: int64 [T], each query's own slot; without one (-1) it has no bias. roles: uint8
    [slots] (`roles.Role`). bias: float32 [blocks, 2] (visual, system), of the request that owns the block.
    Writes out: [T, H, D], and masses: float32 [≥ T, H, 2] (visual, system) or, with None, computes none; then roles are
    read only where a bias asks for them. A row that sees no key gives zeros.
    max_query_len: an upper bound on the queries of one request. A CUDA graph holds for the T, R and max_query_len that
    it was captured with, and for fewer requests and queries in them.
    Raises ValueError for shapes, dtypes, layouts or devices that the kernels don't take.
    """
    tokens, heads, head_size = query.shape
    requests = seq_lens.shape[0]
    _check(query, cache, block_table, query_start, seq_lens, slot_mapping, roles, bias, out, masses, scale, workspace)
    if tokens == 0 or requests == 0:
        return
    block_size, kv_heads = cache.shape[1:3]
    capacity = workspace.parts.shape[0]
    launch = plan(
        tokens, requests, max_query_len, heads, kv_heads, head_size, query.dtype,
        workspace.processors, workspace.hopper, capacity,
    )  # fmt: skip
    split = launch.segments > 1
    probe = masses is not None
    padded_size = triton.next_power_of_2(head_size)
    kernels.attention_kernel[launch.blocks, kv_heads, launch.segments](
        query,
        cache,
        block_table,
        query_start,
        seq_lens,
        slot_mapping,
        roles,
        workspace.ride_rows[query.dtype],
        bias,
        out,
        masses,
        workspace.parts if split else None,
        workspace.sums if split else None,
        query.stride(0),
        cache.stride(0),
        block_table.stride(0),
        out.stride(0),
        requests,
        launch.segments,
        scale,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        HEAD_SIZE=head_size,
        PADDED_SIZE=padded_size,
        BLOCK_SIZE=block_size,
        BLOCK_M=launch.rows,
        TILE=launch.tile,
        # With 16 rows, 16 columns would make every warp compute all of them.
        RIDES=kernels.RIDES if launch.rows == 16 else 16,
        RIDE_STRIDE=kernels.RIDES,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        # Interpreted, a product is numpy's, which has no bfloat16.
        UPCAST=INTERPRETED and query.dtype == torch.bfloat16,
        PROBE=probe,
        SPLIT=split,
        ONE_BLOCK=launch.one_block,
        num_warps=launch.warps,
        num_stages=launch.stages,
        enable_fp_fusion=True,  # newer versions of triton leave products and sums apart unless told
    )
    if split:
        kernels.reduce_kernel[requests if max_query_len == 1 else tokens, heads](
            query_start,
            seq_lens,
            out,
            masses,
            workspace.parts,
            workspace.sums,
            out.stride(0),
            requests,
            launch.segments,
            HEADS=heads,
            HEAD_SIZE=head_size,
            PADDED_SIZE=padded_size,
            MOST_SEGMENTS=launch.segments,
            TILE=launch.tile,
            PROBE=probe,
            ONE_QUERY=max_query_len == 1,
        )


def _check(query, cache, block_table, query_start, seq_lens, slot_mapping, roles, bias, out, masses, scale, space):
    check_cache(cache)
    tokens, heads, size = query.shape
    blocks, block_size, kv_heads, width = cache.shape
    if query.dtype not in DTYPES or cache.dtype != query.dtype:
        raise ValueError(f"query of {query.dtype} and KV cache of {cache.dtype}; needs one dtype of {DTYPES}")
    if size > MAX_HEAD_SIZE or width != 2 * size or heads % kv_heads:
        raise ValueError(
            f"{heads} heads of {size} on {kv_heads} KV heads of {width // 2}: needs equal sizes up to {MAX_HEAD_SIZE} "
            "and a whole number of heads to a KV head"
        )
    for name, rows in (("query", query), ("out", out)):
        if rows.shape != query.shape or not packed(rows):
            raise ValueError(f"{name} is {form(rows)}; needs {list(query.shape)}, each token's heads contiguous")
    requests = len(seq_lens)
    for name, tensor, dtype, least in (
        ("block_table", block_table, torch.int32, requests),
        ("query_start", query_start, torch.int32, requests + 1),
        ("seq_lens", seq_lens, torch.int32, requests),
        ("slot_mapping", slot_mapping, torch.int64, tokens),
        ("roles", roles, torch.uint8, blocks * block_size),
        ("bias", bias, torch.float32, blocks),
    ):
        dimensions = 2 if name in ("block_table", "bias") else 1
        if tensor.dtype != dtype or tensor.dim() != dimensions or len(tensor) < least or tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} is {form(tensor)}; needs {dtype} in {dimensions} dimensions, {least} rows or more"
            )
    if bias.shape[1] != 2 or not bias.is_contiguous():
        raise ValueError(f"bias is {form(bias)}; needs contiguous [{blocks}, 2]")
    if masses is not None:
        wrong = masses.dtype != torch.float32 or masses.shape[1:] != (heads, 2) or len(masses) < tokens
        if wrong or not masses.is_contiguous():
            raise ValueError(f"masses are {form(masses)}; needs contiguous float32 [≥ {tokens}, {heads}, 2]")
    # The bias is divided by the scale, and float16 has to hold the quotient.
    if scale < 2**-10:
        raise ValueError(f"a scale of {scale}; needs at least 2^-10")
    if space.parts.shape[1] != size:
        raise ValueError(f"a workspace for heads of {space.parts.shape[1]}, not of {size}")
