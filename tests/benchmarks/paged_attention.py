"""The Triton paged-attention kernels against vLLM's own unified attention, on the same shapes; needs a CUDA device.

    python tests/benchmarks/paged_attention.py [--models qwen2.5-vl-7b …] [--steps decode-8x1k …] [--dtype bfloat16]

Each figure is the time of one layer's attention: a CUDA graph runs a stack of layers, each with a KV cache of its own,
so that a layer does not find its keys in the device's cache; median of the replays. Methods:

    vllm     vLLM's triton_unified_attention, the split-KV buffers as its backend allocates them
    off      ours, no bias, a layer that is not probed
    bias     a bias for every request, a layer that is not probed
    masses   no bias, a layer that is probed
    both     bias and masses

Factors are vLLM's time divided by ours: above 1 ours is faster; the target is 0.85. Outputs of `vllm` and `off` must be
the same to rounding, else the script fails. Steps that don't fit the device's memory are left out.
"""

import argparse
import importlib.util
import itertools
import math
import statistics
from dataclasses import dataclass

import torch

BLOCK_SIZE = 16
# query heads, KV heads, head size
MODELS = {
    "qwen2.5-vl-7b": (28, 4, 128),
    "qwen3-vl-8b": (32, 8, 128),
    "smolvlm-2b": (32, 32, 64),
    "gemma-3-4b": (8, 4, 256),
}
# (queries, keys) of each request
STEPS = {
    "decode-1x1k": [(1, 1024)],
    "decode-1x32k": [(1, 32768)],
    "decode-8x1k": [(1, 1024)] * 8,
    "decode-32x2k": [(1, 2048)] * 32,
    "decode-128x2k": [(1, 2048)] * 128,
    "decode-256x1k": [(1, 1024)] * 256,
    "prefill-1x4k": [(4096, 4096)],
    "prefill-8x512": [(512, 512)] * 8,
    "chunk-1k-of-16k": [(1024, 16384)],
    "chunk-32-of-8k": [(32, 8192)],
    "mixed-64x2k+512": [(1, 2048)] * 64 + [(512, 512)],
}
METHODS = ("vllm", "off", "bias", "masses", "both")


@dataclass
class Step:
    """Tensors of one step (see `paged_attention`), and the caches of the layers that it runs through."""

    query: torch.Tensor
    caches: list[torch.Tensor]
    block_table: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    slot_mapping: torch.Tensor
    roles: torch.Tensor
    biases: dict[str, torch.Tensor]
    out: torch.Tensor
    masses: torch.Tensor
    scale: float
    max_query_len: int
    max_seq_len: int


def make_step(requests: list[tuple[int, int]], model: str, dtype: torch.dtype, device: str, layers: int) -> Step:
    """Random tensors, blocks of the requests scattered over the cache; an eighth system, three eighths visual keys."""
    heads, kv_heads, size = MODELS[model]
    generator = torch.Generator().manual_seed(0)
    counts = [math.ceil(keys / BLOCK_SIZE) for _, keys in requests]
    order = torch.randperm(sum(counts), generator=generator).int()
    table = torch.zeros(len(requests), max(counts), dtype=torch.int32)
    slots, start = [], 0
    for request, ((queries, keys), count) in enumerate(zip(requests, counts, strict=True)):
        table[request, :count] = order[start : start + count]
        position = torch.arange(keys - queries, keys)
        slots.append(table[request, position // BLOCK_SIZE].long() * BLOCK_SIZE + position % BLOCK_SIZE)
        start += count
    starts = [0, *itertools.accumulate(queries for queries, _ in requests)]
    blocks, tokens = sum(counts), starts[-1]
    role_of_eighth = torch.tensor([1, 2, 2, 2, 3, 3, 4, 4], dtype=torch.uint8)
    bias = torch.zeros(blocks, 2)
    make = {"dtype": dtype, "device": device}
    return Step(
        query=torch.randn(tokens, heads, size, **make),
        caches=[torch.randn(blocks, BLOCK_SIZE, kv_heads, 2 * size, **make) for _ in range(layers)],
        block_table=table.to(device),
        query_start=torch.tensor(starts, dtype=torch.int32, device=device),
        seq_lens=torch.tensor([keys for _, keys in requests], dtype=torch.int32, device=device),
        slot_mapping=torch.cat(slots).to(device),
        roles=role_of_eighth[torch.randint(8, (blocks * BLOCK_SIZE,), generator=generator)].to(device),
        biases={"off": bias.to(device), "on": (bias + torch.tensor([0.14, -0.51])).to(device)},
        out=torch.empty(tokens, heads, size, **make),
        masses=torch.empty(tokens, heads, 2, device=device),
        scale=size**-0.5,
        max_query_len=max(queries for queries, _ in requests),
        max_seq_len=max(keys for _, keys in requests),
    )  # fmt: skip


def run_ours(step: Step, method: str, workspace, layer: int = 0) -> None:
    from verl_avar.rollout.triton_attention import paged_attention

    paged_attention(
        step.query, step.caches[layer], step.block_table, step.query_start, step.seq_lens, step.slot_mapping,
        step.roles, step.biases["on" if method in ("bias", "both") else "off"], step.out,
        step.masses if method in ("masses", "both") else None,
        scale=step.scale, max_query_len=step.max_query_len, workspace=workspace,
    )  # fmt: skip


def vllm_attention(step: Step, heads: int, kv_heads: int, size: int):
    """A function of a layer that runs vLLM's kernel, with the buffers that `TritonAttentionMetadataBuilder` makes."""
    from vllm.v1.attention.backends.triton_attn import MIN_LAUNCH_GRID_SIZE_2D, NUM_PAR_SOFTMAX_SEGMENTS
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    threshold = MIN_LAUNCH_GRID_SIZE_2D // kv_heads
    shape = (threshold, heads, NUM_PAR_SOFTMAX_SEGMENTS)
    make = {"dtype": torch.float32, "device": step.query.device}
    outputs = torch.empty(*shape, 1 << (size - 1).bit_length(), **make)
    tops, totals = torch.empty(shape, **make), torch.empty(shape, **make)

    def run(layer: int = 0) -> None:
        unified_attention(
            q=step.query, k=step.caches[layer][..., :size], v=step.caches[layer][..., size:], out=step.out,
            cu_seqlens_q=step.query_start, max_seqlen_q=step.max_query_len, seqused_k=step.seq_lens,
            max_seqlen_k=step.max_seq_len, softmax_scale=step.scale, causal=True, window_size=(-1, -1),
            block_table=step.block_table, softcap=0, q_descale=None, k_descale=None, v_descale=None,
            seq_threshold_3D=threshold, num_par_softmax_segments=NUM_PAR_SOFTMAX_SEGMENTS,
            softmax_segm_output=outputs, softmax_segm_max=tops, softmax_segm_expsum=totals,
        )  # fmt: skip

    return run


def microseconds(run, layers: int, repeats: int) -> float:
    """Median time of one layer: a graph of all layers, replayed."""
    for layer in range(layers):
        run(layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(layers):
            run(layer)
    times = []
    for _ in range(repeats + 3):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1000 / layers)
    return statistics.median(times[3:])


def measure(model: str, name: str, dtype: torch.dtype, methods: list[str], repeats: int) -> dict[str, float]:
    """Microseconds of each method. Raises RuntimeError where ours and vLLM's outputs differ."""
    from verl_avar.rollout.triton_attention import Workspace

    heads, kv_heads, size = MODELS[model]
    requests = STEPS[name]
    bytes_of_layer = 2 * kv_heads * size * dtype.itemsize * sum(keys for _, keys in requests)
    layers = min(28, max(2, math.ceil(256 * 2**20 / bytes_of_layer)))  # several times what a device caches
    if layers * bytes_of_layer > 0.7 * torch.cuda.mem_get_info()[0]:
        return {}
    step = make_step(requests, model, dtype, "cuda", layers)
    workspace = Workspace.allocate(len(requests), heads, size, "cuda")
    figures = {}
    if "vllm" in methods:
        theirs = vllm_attention(step, heads, kv_heads, size)
        theirs()
        expected = step.out.clone()
        run_ours(step, "off", workspace)
        worst = (step.out.float() - expected.float()).abs().max().item()
        if not worst < 0.05:
            raise RuntimeError(f"{model} {name}: outputs differ by {worst}")
        figures["vllm"] = microseconds(theirs, layers, repeats)
    for method in methods:
        if method != "vllm":
            figures[method] = microseconds(lambda i, m=method: run_ours(step, m, workspace, i), layers, repeats)
    return figures


def table(rows: list[tuple[str, str, dict[str, float]]], methods: list[str]) -> str:
    """Markdown: microseconds, and vLLM's time over ours; – where a step did not fit."""
    lines = [f"| model | step | {' | '.join(methods)} |", "|---" * (len(methods) + 2) + "|"]
    for model, step, figures in rows:
        cells = []
        for method in methods:
            cell = f"{figures[method]:.1f} µs" if method in figures else "–"
            if method != "vllm" and "vllm" in figures and method in figures:
                cell += f" = {figures['vllm'] / figures[method]:.2f}×"
            cells.append(cell)
        lines.append(f"| {model} | {step} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="without vllm: no factors")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args(argv)
    dtype = getattr(torch, options.dtype)
    if not torch.cuda.is_available():
        raise SystemExit(
            "paged_attention.py needs a CUDA device, and PyTorch sees none here; paged_attention_compiled.py says what "
            "compiling tells of the kernels"
        )
    if "vllm" in options.methods and importlib.util.find_spec("vllm") is None:
        raise SystemExit("paged_attention.py: vLLM is not installed here; --methods off bias masses both does without")
    print(f"{torch.cuda.get_device_name()}, {options.dtype}")
    rows = []
    for model in options.models:
        for step in options.steps:
            rows.append((model, step, measure(model, step, dtype, options.methods, options.repeats)))
            torch.cuda.empty_cache()
    print(table(rows, options.methods))


if __name__ == "__main__":
    main()
