"""The KV cache of `triton_attention`: [blocks, block_size, H_kv, 2·D], keys then values. Writing to it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def write_kernel(
    key,
    value,
    cache,
    slot_mapping,
    key_stride,
    value_stride,
    block_stride,
    KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Key and value of one token to its slot, CHUNK elements of its heads a program. Grid (tokens, chunks)."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    element = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    real = element < KV_HEADS * HEAD_SIZE
    row = (slot // BLOCK_SIZE).to(tl.int64) * block_stride + slot % BLOCK_SIZE * (KV_HEADS * 2 * HEAD_SIZE)
    target = cache + row + element // HEAD_SIZE * (2 * HEAD_SIZE) + element % HEAD_SIZE
    tl.store(target, tl.load(key + token * key_stride + element, mask=real), mask=real)
    tl.store(target + HEAD_SIZE, tl.load(value + token * value_stride + element, mask=real), mask=real)


# Under TRITON_INTERPRET=1 kernels run on CPU tensors.
INTERPRETED = not isinstance(write_kernel, triton.runtime.JITFunction)


def write_cache(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Writes keys and values to their slots. key, value: [≥ T, H_kv, D]. cache: [blocks, block_size, H_kv, 2·D].
    slot_mapping: int64 [T]; rows of slot -1 are skipped. Raises ValueError for what the kernel doesn't take."""
    check_cache(cache)
    _, block_size, kv_heads, width = cache.shape
    size = width // 2
    for name, rows in (("key", key), ("value", value)):
        if rows.shape[1:] != (kv_heads, size) or rows.dtype != cache.dtype or not packed(rows):
            raise ValueError(
                f"write_cache: {name} is {form(rows)}; needs [tokens, {kv_heads}, {size}] of {cache.dtype}, each "
                "token's heads contiguous"
            )
    tokens = len(slot_mapping)
    if slot_mapping.dtype != torch.int64 or slot_mapping.stride() != (1,) or min(len(key), len(value)) < tokens:
        raise ValueError(
            f"write_cache: slot_mapping is {form(slot_mapping)}; needs contiguous int64, one a key at most"
        )
    if tokens == 0:
        return
    chunk = min(1024, triton.next_power_of_2(kv_heads * size))
    write_kernel[tokens, triton.cdiv(kv_heads * size, chunk)](
        key,
        value,
        cache,
        slot_mapping,
        key.stride(0),
        value.stride(0),
        cache.stride(0),
        KV_HEADS=kv_heads,
        HEAD_SIZE=size,
        BLOCK_SIZE=block_size,
        CHUNK=chunk,
    )


def check_cache(cache: torch.Tensor) -> None:
    """Raises ValueError for a KV cache that the kernels can't read."""
    if cache.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"triton kernels run on CUDA, not on {cache.device} (TRITON_INTERPRET=1 runs them in numpy)")
    _, block_size, _, width = cache.shape
    if block_size % 16 or width % 2 or not packed(cache):
        raise ValueError(
            f"the KV cache is {form(cache)}; needs [blocks, a multiple of 16, H_kv, 2·D] with contiguous blocks"
        )


def packed(tensor: torch.Tensor) -> bool:
    """Whether what lies under each index of the first dimension is contiguous."""
    stride = 1
    for size, own in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size != 1 and own != stride:
            return False
        stride *= size
    return True


def form(tensor: torch.Tensor) -> str:
    """Of a tensor, what an error needs to say."""
    return f"{tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
