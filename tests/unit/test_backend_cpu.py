"""The CPU backend (vLLM's own kernel, roles riding in the KV cache) against naive attention of each request alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder

from verl_avar.attention import reference
from verl_avar.roles import Role
from verl_avar.rollout import backend_cpu
from verl_avar.rollout.backend_cpu import RoleAttention, RoleAttentionBackend, ridden_head_size
from verl_avar.rollout.layer import link_layers
from verl_avar.rollout.options import RequestOptions
from verl_avar.rollout.slots import BlockMarks, SlotState

BLOCK, BLOCKS = 32, 24

# (keys of the request, how many of them are this step's queries, visual bias, system bias)
BATCHES = {
    "decode": [(9, 1, 0.0, 0.0), (3, 1, 0.7, 0.0), (80, 1, 0.0, -1.5), (40, 1, 20.0, -20.0)],
    "prefill": [(8, 8, 0.0, 0.0), (50, 50, 0.5, -0.5), (13, 13, 1.0, 0.0)],
    "mixed, chunked": [(70, 5, 0.3, 0.0), (6, 1, 0.0, 0.0), (1, 1, 0.0, 0.0), (40, 35, 0.0, 0.4)],
}
HEADS = [(3, 3, 32, torch.float32), (4, 2, 64, torch.bfloat16), (4, 1, 80, torch.float32), (2, 1, 128, torch.float16)]


@pytest.fixture
def build(monkeypatch):
    """build(heads, kv_heads, size, dtype) -> the attention of two layers and vLLM's own metadata builder for it."""

    def build(heads, kv_heads, size, dtype):
        model = SimpleNamespace(dtype=dtype, get_num_attention_heads=lambda parallel: heads)
        cache = SimpleNamespace(block_size=BLOCK, cache_dtype="auto")
        config = SimpleNamespace(model_config=model, cache_config=cache, parallel_config=None)
        for module in (cpu_attn, backend_cpu):
            monkeypatch.setattr(module, "get_current_vllm_config", lambda: config)
        impls = [RoleAttention(heads, size, size**-0.5, kv_heads) for _ in range(2)]
        spec = SimpleNamespace(num_kv_heads=kv_heads, head_size=impls[0].head_size)
        return impls, CPUAttentionMetadataBuilder(spec, [], config, torch.device("cpu"))

    return build


def _tokens(batch, generator):
    """A step's slots and each request's own, with blocks in shuffled order."""
    free = (torch.randperm(BLOCKS - 1, generator=generator) + 1).tolist()
    marks, table, own = BlockMarks(), torch.zeros(len(batch), 4, dtype=torch.int32), []
    for row, (length, _, visual, system) in enumerate(batch):
        blocks = [free.pop() for _ in range(-(-length // BLOCK))]
        table[row, : len(blocks)] = torch.tensor(blocks)
        roles = np.full(length, Role.USER, dtype=np.uint8)
        roles[:3], roles[4:8] = Role.SYSTEM, Role.VISUAL
        marks.add(blocks, 0, roles, RequestOptions(visual, system), BLOCK)
        slots = torch.tensor([block * BLOCK + i for block in blocks for i in range(BLOCK)])[:length]
        own.append((slots, torch.from_numpy(roles)))
    return marks, table, own


def _metadata(builder, lengths, start, table, slots):
    return builder.build(
        0,
        SimpleNamespace(
            num_reqs=len(lengths),
            num_actual_tokens=len(slots),
            max_query_len=int(start.diff().max()),
            max_seq_len=int(lengths.max()),
            query_start_loc=start,
            seq_lens=lengths,
            block_table_tensor=table,
            slot_mapping=slots,
            causal=True,
        ),
    )


LAYER = SimpleNamespace(_k_scale_float=1.0, _v_scale_float=1.0)


@pytest.mark.parametrize(("heads", "kv_heads", "size", "dtype"), HEADS)
@pytest.mark.parametrize("name", BATCHES)
def test_output_and_masses_equal_each_request_by_itself(name, heads, kv_heads, size, dtype, build):
    batch, generator = BATCHES[name], torch.Generator().manual_seed(0)
    impls, builder = build(heads, kv_heads, size, dtype)
    marks, table, own = _tokens(batch, generator)
    state = SlotState(BLOCKS, BLOCK, 2, 128, heads, torch.zeros(BLOCKS * BLOCK + 1, 5))
    link_layers(impls, state, [0, 1])
    shape = RoleAttentionBackend.get_kv_cache_shape(BLOCKS, BLOCK, kv_heads, impls[0].head_size)
    # Rows that no token of the step owns hold what earlier requests left.
    caches = [torch.randn(shape, generator=generator).to(dtype) for _ in impls]

    def rows(of_request, count):
        return torch.cat([torch.randn(len(slots), count, size, generator=generator) for slots in of_request]).to(dtype)

    everything = [slots for slots, _ in own]
    key, value = rows(everything, kv_heads), rows(everything, kv_heads)
    query = rows(everything, heads)
    lengths = torch.tensor([len(slots) for slots in everything], dtype=torch.int32)
    asked = torch.tensor([count for _, count, *_ in batch], dtype=torch.int32)
    ends = lengths.cumsum(0)
    state.begin(marks)
    # First the tokens that were computed in earlier steps, then this step's.
    for chosen, seen in (
        ([range(end - n, end - q) for end, n, q in zip(ends, lengths, asked, strict=True)], lengths - asked),
        ([range(end - q, end) for end, q in zip(ends, asked, strict=True)], lengths),
    ):
        index = torch.tensor([i for r in chosen for i in r], dtype=torch.long)
        if not len(index):
            continue
        counts = torch.tensor([len(r) for r in chosen])
        kept = counts > 0
        start = torch.cat((torch.zeros(1), counts[kept].cumsum(0))).int()
        metadata = _metadata(builder, seen[kept], start, table[kept], torch.cat(everything)[index])
        state.begin(BlockMarks())
        outs = [torch.empty(len(index), heads, size, dtype=dtype) for _ in impls]
        for impl, cache, out in zip(impls, caches, outs, strict=True):
            impl.forward(LAYER, query[index], key[index], value[index], cache, metadata, out)
    assert torch.equal(outs[0], outs[1]) and torch.equal(state.masses[0], state.masses[1])

    exact = dtype == torch.float32
    done = 0
    for (slots, roles), (length, queries, visual, system), end in zip(own, batch, ends.tolist(), strict=True):
        whole = slice(end - length, end)
        bias = torch.zeros(1, length)
        bias[:, roles == Role.VISUAL], bias[:, roles == Role.SYSTEM] = visual, system
        q = query[end - queries : end].float().transpose(0, 1)[None]
        weights = reference.attention_map(q, key[whole].float().transpose(0, 1)[None], bias=bias)
        values = value[whole].float().transpose(0, 1)[None].repeat_interleave(heads // kv_heads, dim=1)
        mass = reference.role_mass(weights, roles[None], [Role.VISUAL, Role.SYSTEM])[0].transpose(0, 1)
        here = slice(done, done + queries)
        close = dict(atol=2e-6, rtol=1e-5) if exact else dict(atol=2e-2, rtol=1e-2)
        torch.testing.assert_close(outs[0][here].float(), (weights @ values)[0].transpose(0, 1), **close)
        close = dict(atol=2e-6, rtol=1e-5) if exact else dict(atol=4e-3, rtol=0)
        torch.testing.assert_close(state.masses[0, here], mass, **close)
        written = state.scores[slots[length - queries :]]
        torch.testing.assert_close(written[:, 2:4], state.masses[0, here].mean(1))
        done += queries


def test_a_small_bias_survives_half_precision(build):
    """0.01 of bias rounded to bfloat16 together with the scale would be off by more than what is asked here."""
    heads, size, length = 2, 64, 64
    impls, builder = build(heads, 1, size, torch.bfloat16)
    marks = BlockMarks()
    roles = np.full(length, Role.USER, dtype=np.uint8)
    roles[:32] = Role.VISUAL
    marks.add([1, 2], 0, roles, RequestOptions(visual_bias=0.0123), BLOCK)
    state = SlotState(BLOCKS, BLOCK, 2, 128, heads, torch.zeros(BLOCKS * BLOCK + 1, 5))
    link_layers(impls, state, [0, 1])
    state.begin(marks)
    slots = torch.arange(length) + BLOCK
    start = torch.tensor([0, length], dtype=torch.int32)
    table = torch.tensor([[1, 2]], dtype=torch.int32)
    metadata = _metadata(builder, torch.tensor([length], dtype=torch.int32), start, table, slots)
    rows = impls[0]._rows(slots, torch.bfloat16)
    applied = (rows.query[:, 0, size:].float() * rows.key[:1, 0, size:].float()).sum(-1) * size**-0.5
    torch.testing.assert_close(applied, torch.full((length,), 0.0123), rtol=3e-5, atol=0)
    nothing = torch.zeros(length, heads, size, dtype=torch.bfloat16)
    cache = torch.zeros(RoleAttentionBackend.get_kv_cache_shape(BLOCKS, BLOCK, 1, impls[0].head_size)).bfloat16()
    impls[0].forward(LAYER, nothing, nothing[:, :1], nothing[:, :1], cache, metadata, torch.empty_like(nothing))
    pulled = np.exp(0.0123)
    assert state.masses[0, length - 1, 0, 0].item() == pytest.approx(pulled / (1 + pulled), abs=1e-3)


def test_a_layer_that_is_not_probed_leaves_no_masses(build):
    impls, _ = build(2, 1, 32, torch.float32)
    state = SlotState(BLOCKS, BLOCK, 1, 8, 2, torch.zeros(BLOCKS * BLOCK + 1, 5))
    link_layers(impls, state, [0])
    assert impls[0].slots.masses is not None and impls[0].slots.last
    assert impls[1].slots.masses is None and not impls[1].slots.last


@pytest.mark.parametrize(
    ("unsupported", "name"),
    [
        ({"sliding_window": 128}, "sliding_window"),
        ({"alibi_slopes": [1.0]}, "alibi_slopes"),
        ({"logits_soft_cap": 30.0}, "logits_soft_cap"),
        ({"kv_cache_dtype": "fp8"}, "KV cache of type fp8"),
        ({"attn_type": "encoder_only"}, "attention type encoder_only"),
        ({"sinks": torch.zeros(2)}, "sinks"),
    ],
)
def test_what_the_backend_does_not_support_is_refused_by_name(unsupported, name):
    with pytest.raises(NotImplementedError, match=name):
        RoleAttention(2, 32, 1.0, 2, **unsupported)


def test_head_sizes_have_room_for_the_riders_or_are_refused():
    sizes = (32, 64, 80, 96, 128, 256)
    assert [ridden_head_size(size, "vec") for size in sizes] == [64, 80, 96, 112, 160, 512]
    assert [ridden_head_size(size, "amx") for size in sizes] == [64, 96, 96, 128, 160, 512]
    with pytest.raises(NotImplementedError, match="heads of 512"):
        ridden_head_size(512, "vec")
