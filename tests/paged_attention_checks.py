"""Checks of the Triton attention kernels, on the device named: "cuda", or "cpu" in a process that interprets them."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from paged_attention_grid import CASES, DTYPES, UNTOUCHED, Case, compare, make_step, make_workspace, results

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes of a multiprocessor's shared memory that programs can have


def interpret() -> None:
    """Makes this process run kernels in numpy, on CPU tensors; before it imports triton."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


def compile_only(cache: str) -> None:
    """Makes this process compile kernels, into a cache of its own."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = cache
    sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmarks"))


def check_compiled(model: str, step: str, capability: int, probed: bool) -> None:
    """A step's kernel compiles without spilling, and two of its programs fit one multiprocessor."""
    from paged_attention import STEPS
    from paged_attention_compiled import compiled

    figures = compiled(STEPS[step], model, torch.bfloat16, capability, probed)
    assert figures["spilled"] == 0 and 2 * figures["shared"] <= SHARED[capability], figures
    assert 2 * figures["registers"] * 32 * figures["warps"] <= 65536, figures


def check_case(name: str, device: str = "cpu") -> None:
    step = make_step(CASES[name], device)
    compare(step, *results(step))


def check_random_batch(seed: int, device: str = "cpu") -> None:
    """A batch of everything at once, drawn: kinds of request, lengths, heads, sizes, dtype."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*options):
        return options[int(torch.randint(len(options), (), generator=generator))]

    requests = []
    for _ in range(draw(2, 3, 4)):
        keys = int(torch.randint(1, 90, (), generator=generator))
        requests.append((draw(0, 1, 1, keys, min(keys, draw(3, 17))), keys))
    kv_heads = draw(1, 2)
    case = Case(
        tuple(requests), draw(*DTYPES), kv_heads * draw(1, 3, 4, 7), kv_heads, draw(32, 64, 80, 128), draw(16, 32, 128),
        masses=draw(True, True, False), padding=draw(0, 7), hopper=draw(True, False), seed=seed,
    )  # fmt: skip
    step = make_step(case, device)
    try:
        compare(step, *results(step))
    except AssertionError as error:
        raise AssertionError(f"{case}: {error}") from None


def check_layers(device: str = "cpu") -> None:
    """Layers with caches of their own, one after another on one workspace, masses of each in one tensor's slices."""
    from verl_avar.rollout.triton_attention import paged_attention

    first = make_step(CASES["decode"], device)
    steps = [first, replace(first, cache=first.cache * -0.5)]
    workspace = make_workspace(steps[0].case, device)
    tokens, heads = steps[0].query.shape[:2]
    masses = torch.full((2, tokens + 1, heads, 2), UNTOUCHED, device=device)
    outs = []
    for layer, step in enumerate(steps):
        outs.append(torch.full(step.query.shape, UNTOUCHED, dtype=step.query.dtype, device=device))
        bounds = {"scale": step.scale, "max_query_len": 1, "workspace": workspace}
        paged_attention(*step.tensors(), outs[layer], masses[layer], **bounds)
    for layer, step in enumerate(steps):
        compare(step, outs[layer], masses[layer])
    assert not torch.equal(outs[0], outs[1])


def check_other_lengths(name: str, device: str = "cpu") -> None:
    """A launch on one step's tensors, made again when another step of as many requests and rows is in their place.

    On a GPU the second is a replay of the first, which was captured; there, waiting for the device is an error.
    """
    from verl_avar.rollout.triton_attention import paged_attention

    case = CASES[name]
    shorter = tuple((queries, max(queries, keys * 2 // 3)) for queries, keys in case.requests)
    step, other = make_step(case, device), make_step(replace(case, requests=shorter, seed=1), device)
    workspace = make_workspace(case, device)
    out, masses = results(step, workspace)
    bounds = {"scale": step.scale, "max_query_len": step.max_query_len(), "workspace": workspace}

    def launch() -> None:
        paged_attention(*step.tensors(), out, masses, **bounds)

    if device == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.graph(graph):
                launch()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        launch = graph.replay
    for own, others in zip(step.tensors(), other.tensors(), strict=True):
        place = own[:, : others.shape[1]] if own is step.block_table else own[: len(others)]
        place.copy_(others)
    for result in (out, masses):
        if result is not None:
            result.fill_(UNTOUCHED)
    launch()
    compare(other, out, masses)


def check_far_blocks(device: str = "cpu") -> None:
    """Blocks of a cache whose offsets pass 2^31 elements. On a CPU, the memory is only there where it is written."""
    step = make_step(Case(((1, 40), (20, 20)), "float16"), device)
    size = step.case.block_size
    per_block = step.cache[0].numel()
    blocks = 2**31 // per_block + len(step.cache) + 1
    cache = torch.empty(blocks, *step.cache.shape[1:], dtype=step.cache.dtype, device=device)
    moved = blocks - len(step.cache)
    cache[moved:] = step.cache
    roles = torch.zeros(blocks * size, dtype=torch.uint8, device=device)
    roles[moved * size :] = step.roles
    bias = torch.zeros(blocks, 2, device=device)
    bias[moved:] = step.bias
    far = replace(
        step, cache=cache, roles=roles, bias=bias, block_table=step.block_table + moved,
        slot_mapping=torch.where(step.slot_mapping >= 0, step.slot_mapping + moved * size, -1),
    )  # fmt: skip
    compare(far, *results(far))


def check_write(device: str = "cpu") -> None:
    """Keys and values land in their slots, and nowhere else; rows of slot -1 are skipped."""
    from verl_avar.rollout.triton_attention import write_cache

    generator = torch.Generator().manual_seed(0)
    for dtype, kv_heads, size, block_size in ((torch.float32, 3, 80, 16), (torch.bfloat16, 2, 32, 48)):
        cache = torch.full((9, block_size, kv_heads, 2 * size), torch.nan).to(device, dtype)
        slots = torch.randperm(9 * block_size, generator=generator)[:40].to(device)
        slots[[3, 17, 39]] = -1
        # As vLLM has it: keys and values are parts of one projection's rows, and padded.
        both = torch.randn(44, 2 * kv_heads * size + 8, generator=generator).to(device, dtype)
        key, value = (both[:, i * kv_heads * size :][:, : kv_heads * size].view(44, kv_heads, size) for i in (0, 1))
        true = cache.clone()
        for row, slot in enumerate(slots.tolist()):
            if slot >= 0:
                true[slot // block_size, slot % block_size] = torch.cat((key[row], value[row]), dim=-1)
        write_cache(key, value, cache, slots)
        torch.testing.assert_close(cache, true, rtol=0, atol=0, equal_nan=True)


def check_far_write(device: str = "cpu") -> None:
    """A slot whose offset passes 2^31 elements."""
    from verl_avar.rollout.triton_attention import write_cache

    shape = (16, 2, 2 * 32)
    blocks = 2**31 // (16 * 2 * 64) + 4
    cache = torch.empty(blocks, *shape, dtype=torch.float16, device=device)
    key, value = torch.full((1, 2, 32), 1.0, dtype=torch.float16), torch.full((1, 2, 32), 2.0, dtype=torch.float16)
    slots = torch.tensor([(blocks - 1) * 16 + 5])
    write_cache(key.to(device), value.to(device), cache, slots.to(device))
    assert (cache[-1, 5, :, :32] == 1).all() and (cache[-1, 5, :, 32:] == 2).all()


def check_refusals(device: str = "cpu") -> None:
    """What the kernels don't take is a ValueError that names it."""
    from verl_avar.rollout.triton_attention import paged_attention, write_cache

    step = make_step(Case(((1, 20),)), device)
    out, masses = torch.empty_like(step.query), torch.empty(1, 4, 2, device=device)
    bounds = {"scale": step.scale, "max_query_len": 1, "workspace": make_workspace(step.case, device)}
    arguments = dict(zip(
        ("query", "cache", "block_table", "query_start", "seq_lens", "slot_mapping", "roles", "bias", "out", "masses"),
        (*step.tensors(), out, masses), strict=True,
    )) | bounds  # fmt: skip
    small = make_workspace(replace(step.case, head_size=64), device)
    for changes, named in (
        ({"query": step.query.half()}, "float16"),
        ({"query": step.query[:, :3], "out": out[:, :3]}, "3 heads of 32 on 2 KV heads"),
        ({"cache": step.cache[:, :8]}, "the KV cache is"),
        ({"out": out.transpose(1, 2).contiguous().transpose(1, 2)}, "out is"),
        ({"block_table": step.block_table.long()}, "block_table is"),
        ({"query_start": step.query_start[:1]}, "query_start is"),
        ({"slot_mapping": step.slot_mapping.int()}, "slot_mapping is"),
        ({"roles": step.roles[:-1]}, "roles is"),
        ({"bias": step.bias[:, 0]}, "bias is"),
        ({"masses": masses.double()}, "masses are"),
        ({"masses": masses[:, :3]}, "masses are"),
        ({"scale": 1e-5}, "a scale of"),
        ({"workspace": small}, "a workspace for heads of 64"),
    ):
        _refused(named, paged_attention, **(arguments | changes))
    key = step.cache[0, :, :, :32].contiguous()
    _refused("slot_mapping is", write_cache, key, key, step.cache, torch.zeros(17, dtype=torch.int64, device=device))
    _refused("key is", write_cache, key.half(), key, step.cache, step.slot_mapping)
    _refused("value is", write_cache, key, key[:, :1], step.cache, step.slot_mapping)


def _refused(named: str, function, *arguments, **keywords) -> None:
    try:
        function(*arguments, **keywords)
    except ValueError as error:
        assert named in str(error), f"{error} does not name {named}"
    else:
        raise AssertionError(f"not refused: {named}")
