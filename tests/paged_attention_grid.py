"""Batches for the Triton attention kernels, and their comparison with `reference_attention`, on a GPU or interpreted.

Nothing here imports triton before a kernel is to run, so that a process can decide first how its kernels run.
"""

import itertools
from dataclasses import dataclass, field, replace

import torch

from verl_avar.roles import Role

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Outputs are weighted means of values of about ±3, masses lie in 0 … 1; both are as exact as the dtype of the products.
TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
MASS_TOLERANCE = {"float32": 1e-5, "float16": 5e-4, "bfloat16": 4e-3}
UNTOUCHED = 7.0


@dataclass(frozen=True)
class Case:
    """One step. requests: (queries, keys) of each; a decode is (1, n), a chunk of a prompt (q, n), a whole one (n, n).

    shared: blocks at the start of the second request that are those of the first. bias: of each request (visual,
    system), or drawn. padding: rows and requests' worth of queries after the last.
    """

    requests: tuple[tuple[int, int], ...]
    dtype: str = "float32"
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 32
    block_size: int = 16
    bias: tuple[tuple[float, float], ...] | None = None
    masses: bool = True
    shared: int = 0
    padding: int = 0
    max_query_len: int | None = None
    hopper: bool = False
    seed: int = 0


MIXED = ((1, 37), (21, 21), (0, 9), (5, 40), (1, 1), (18, 50), (0, 3))
DECODE = ((1, 75), (1, 1), (0, 20), (1, 33), (1, 16))
CASES = {
    "mixed": Case(MIXED, heads=6, shared=1, padding=5),
    "mixed, float16, hopper": Case(MIXED, "float16", heads=7, kv_heads=1, head_size=64, shared=1, hopper=True),
    "mixed, bfloat16, large blocks": Case(MIXED, "bfloat16", head_size=128, block_size=64, padding=2),
    "mixed, no masses": Case(MIXED, "float16", head_size=64, masses=False, padding=3),
    "no masses, no bias": Case(((1, 37), (5, 40)), masses=False, bias=((0.0, 0.0), (0.0, 0.0))),
    "bias of one role": Case(((1, 37), (1, 40), (4, 20)), masses=False, bias=((0.0, 0.0), (0.0, -1.5), (2.0, 0.0))),
    "no bias": Case(((1, 37), (5, 40)), bias=((0.0, 0.0), (0.0, 0.0))),
    "first query a key short of a tile": Case(((4, 18), (4, 34)), heads=2),
    "long prompt": Case(((130, 150),), "bfloat16", heads=2, head_size=64, hopper=True),
    "short chunk on long context": Case(((20, 250),), "float16", heads=4, kv_heads=1, head_size=64),
    "decode": Case(DECODE, shared=1),
    "decode, float16": Case(DECODE, "float16", heads=8, kv_heads=1, head_size=128, padding=3),
    "decode, bfloat16, head size 80": Case(DECODE, "bfloat16", heads=2, head_size=80, block_size=48),
    "decode, no masses": Case(DECODE, "float16", heads=2, kv_heads=1, masses=False),
    "one long decode": Case(((1, 700),), "float16", heads=3, kv_heads=1, head_size=64),
    "head size 96": Case(((1, 37), (9, 20)), "float16", heads=2, kv_heads=2, head_size=96),
    "head size 112": Case(((1, 37), (9, 20)), "float32", heads=2, kv_heads=1, head_size=112),
    "head size 256": Case(((1, 37), (9, 20)), "bfloat16", heads=2, kv_heads=1, head_size=256),
    "head size 256, hopper": Case(((1, 37), (9, 20)), "float16", heads=2, kv_heads=1, head_size=256, hopper=True),
    "group of 20": Case(((1, 37), (4, 20)), "float16", heads=20, kv_heads=1, head_size=64),
    "greatest biases": Case(
        ((1, 60), (30, 60), (9, 9)), bias=((20.0, 20.0), (-20.0, 20.0), (-20.0, -20.0)), head_size=64, heads=2
    ),
    "greatest biases, bfloat16": Case(((1, 60), (30, 60)), "bfloat16", bias=((20.0, -20.0), (-20.0, 20.0)), heads=2),
    # In bfloat16 the two divided by the scale would be one number.
    "biases that differ by little": Case(((1, 60), (9, 60)), "bfloat16", bias=((18.81, 18.753),) * 2, head_size=64),
    "queries without keys": Case(((1, 0), (5, 3), (1, 37)), heads=2),
    "queries without keys, keys not split": Case(((1, 0), (5, 3), (1, 37), (1, 1), (0, 0)), heads=4),
    "decode without keys": Case(((1, 0), (1, 40)), heads=2),
    "bounds above what comes": Case(((1, 37), (2, 50), (0, 0)), heads=2, padding=9, max_query_len=8),
}


@dataclass
class Step:
    """A case's tensors, as `paged_attention` takes them, and the slots that hold keys."""

    case: Case
    query: torch.Tensor
    cache: torch.Tensor
    block_table: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    slot_mapping: torch.Tensor
    roles: torch.Tensor
    bias: torch.Tensor
    used: torch.Tensor
    scale: float = field(init=False)

    def __post_init__(self):
        self.scale = self.case.head_size**-0.5

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (
            self.query, self.cache, self.block_table, self.query_start, self.seq_lens, self.slot_mapping, self.roles,
            self.bias,
        )  # fmt: skip

    def max_query_len(self) -> int:
        return self.case.max_query_len or max(queries for queries, _ in self.case.requests)


def make_step(case: Case, device: str) -> Step:
    """Random tensors. What no request uses holds NaN (cache), random bytes (roles) or numbers of no block (table)."""
    generator = torch.Generator().manual_seed(case.seed)
    dtype, size = DTYPES[case.dtype], case.block_size
    blocks_of = [-(-keys // size) for _, keys in case.requests]
    blocks = sum(blocks_of) + 2
    order = iter(torch.randperm(blocks, generator=generator).tolist())
    tables = [[next(order) for _ in range(n)] for n in blocks_of]
    if case.shared:
        tables[1][: case.shared] = tables[0][: case.shared]
    table = torch.full((len(tables), max(blocks_of) + 1), 2**30, dtype=torch.int32)
    for request, row in enumerate(tables):
        table[request, : len(row)] = torch.tensor(row, dtype=torch.int32)

    starts = [0, *itertools.accumulate(queries for queries, _ in case.requests)]
    tokens = starts[-1] + case.padding
    slot_mapping = torch.full((tokens,), -1)
    used = torch.zeros(blocks * size, dtype=torch.bool)
    bias = torch.zeros(blocks, 2)
    for request, (queries, keys) in enumerate(case.requests):
        slots = [tables[request][i // size] * size + i % size for i in range(keys)]
        used[slots] = True
        own = slots[keys - queries :] if keys >= queries else [-1] * (queries - keys) + slots
        slot_mapping[starts[request] : starts[request + 1]] = torch.tensor(own, dtype=torch.int64)
        drawn = torch.randn(2, generator=generator) if case.bias is None else torch.tensor(case.bias[request])
        bias[tables[request][case.shared if request == 1 else 0 :]] = drawn

    cache = torch.randn(blocks * size, case.kv_heads, 2 * case.head_size, generator=generator).to(dtype)
    cache[~used] = torch.nan
    # As vLLM has it: a part of one projection's rows. What lies beside it is none of the kernel's business.
    width = case.heads * case.head_size
    projection = torch.randn(tokens, 2 * width, generator=generator).to(dtype)
    projection[:, width:] = torch.nan
    query = projection[:, :width].view(tokens, case.heads, -1)
    roles = torch.randint(0, len(Role), (blocks * size,), generator=generator).to(torch.uint8)
    roles[~used] = torch.randint(0, 256, (int((~used).sum()),), generator=generator).to(torch.uint8)
    on_device = [
        tensor.to(device)
        for tensor in (
            query, cache.view(blocks, size, case.kv_heads, -1), table, torch.tensor(starts, dtype=torch.int32),
            torch.tensor([keys for _, keys in case.requests], dtype=torch.int32), slot_mapping, roles, bias, used,
        )
    ]  # fmt: skip
    return Step(case, *on_device)


def make_workspace(case: Case, device: str):
    """A workspace with the remains of an earlier step in it."""
    from verl_avar.rollout.triton_attention import Workspace

    workspace = Workspace.allocate(8, case.heads, case.head_size, device)
    workspace.parts.fill_(torch.nan)
    workspace.sums.fill_(torch.nan)
    return replace(workspace, hopper=case.hopper) if device == "cpu" else workspace


def results(step: Step, workspace=None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output and masses of the kernel, over what nothing has touched."""
    from verl_avar.rollout.triton_attention import paged_attention

    tokens, heads = step.query.shape[:2]
    out = torch.full(step.query.shape, UNTOUCHED, dtype=step.query.dtype, device=step.query.device)
    masses = torch.full((tokens + 1, heads, 2), UNTOUCHED, device=out.device) if step.case.masses else None
    workspace = workspace or make_workspace(step.case, step.query.device.type)
    bounds = {"scale": step.scale, "max_query_len": step.max_query_len(), "workspace": workspace}
    paged_attention(*step.tensors(), out, masses, **bounds)
    return out, masses


def expected(step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """Output in float64 and masses of the reference."""
    from verl_avar.rollout.reference_attention import reference_attention

    tokens, heads, size = step.query.shape
    out = torch.full((tokens, heads, size), UNTOUCHED, dtype=torch.float64, device=step.query.device)
    masses = torch.full((tokens + 1, heads, 2), UNTOUCHED, device=out.device)
    reference_attention(*step.tensors(), out, masses, scale=step.scale)
    return out, masses


def compare(step: Step, out: torch.Tensor, masses: torch.Tensor | None) -> None:
    """Fails where output or masses are not those of the reference, or a row of no request was written."""
    true_out, true_masses = expected(step)
    rows = int(step.query_start[-1])
    tolerance = TOLERANCE[step.case.dtype]
    torch.testing.assert_close(out[:rows].double(), true_out[:rows], atol=tolerance, rtol=tolerance)
    assert (out[rows:] == UNTOUCHED).all()
    if masses is not None:
        torch.testing.assert_close(masses[:rows], true_masses[:rows], atol=MASS_TOLERANCE[step.case.dtype], rtol=0)
        assert (masses[rows:] == UNTOUCHED).all()
