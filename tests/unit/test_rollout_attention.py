"""Paged attention with role bias and scores against naive attention over each request's own tokens."""

import numpy as np
import pytest
import torch

from verl_avar.attention import reference
from verl_avar.roles import Role
from verl_avar.rollout import paged_attention
from verl_avar.rollout.options import RequestOptions
from verl_avar.rollout.paged_attention import attend, plan_tiles
from verl_avar.rollout.slots import BlockMarks, SlotState

BLOCK = 4
BLOCKS = 64

# (keys of the request, how many of them are this step's queries, visual bias, system bias)
BATCHES = {
    "decode": [(9, 1, 0.0, 0.0), (3, 1, 0.7, 0.0), (17, 1, 0.0, -1.5)],
    "prefill": [(8, 8, 0.0, 0.0), (8, 8, 0.5, -0.5), (13, 13, 1.0, 0.0)],
    "mixed, chunked": [(14, 5, 0.3, 0.0), (6, 1, 0.0, 0.0), (1, 1, 0.0, 0.0), (20, 5, 0.0, 0.4)],
}


def _step(batch, heads, kv_heads, size, dtype, generator):
    """A step's tensors with blocks in shuffled order, and what each request looks like by itself."""
    free = torch.randperm(BLOCKS, generator=generator).tolist()
    state = SlotState(BLOCKS, BLOCK, np.zeros((BLOCKS * BLOCK, 4), dtype=np.float32))
    cache = torch.randn(BLOCKS * BLOCK, kv_heads, 2 * size, generator=generator).to(dtype)
    marks, table, alone = BlockMarks(), torch.zeros(len(batch), 8, dtype=torch.int32), []
    slot_mapping, query = [], []
    for row, (length, queries, visual_bias, system_bias) in enumerate(batch):
        blocks = [free.pop() for _ in range(-(-length // BLOCK))]
        table[row, : len(blocks)] = torch.tensor(blocks)
        prompt = np.full(length, Role.USER, dtype=np.uint8)
        prompt[:3], prompt[4:8] = Role.SYSTEM, Role.VISUAL
        marks.add(blocks, 0, prompt, RequestOptions(visual_bias, system_bias), BLOCK)
        slots = torch.tensor([block * BLOCK + i for block in blocks for i in range(BLOCK)])[:length]
        q = torch.randn(queries, heads, size, generator=generator).to(dtype)
        query.append(q)
        slot_mapping.append(slots[-queries:])
        alone.append((q, slots, torch.from_numpy(prompt)))
    state.mark(marks)
    start = torch.tensor([0] + [queries for _, queries, *_ in batch]).cumsum(0)
    lengths = torch.tensor([length for length, *_ in batch])
    return state, cache, torch.cat(query), start, lengths, table, torch.cat(slot_mapping), alone


@pytest.mark.parametrize("max_weights", [2**24, 64])
@pytest.mark.parametrize(("heads", "kv_heads", "dtype"), [(3, 1, torch.float32), (4, 2, torch.bfloat16)])
@pytest.mark.parametrize("name", BATCHES)
def test_paged_attention_equals_each_request_by_itself(name, heads, kv_heads, dtype, max_weights, monkeypatch):
    monkeypatch.setattr(paged_attention, "MAX_WEIGHTS", max_weights)
    size, batch = 8, BATCHES[name]
    state, cache, query, start, lengths, table, slots, alone = _step(
        batch, heads, kv_heads, size, dtype, torch.Generator().manual_seed(0)
    )
    out, masses = torch.empty_like(query), torch.empty(len(query), 2)
    for tile in plan_tiles(start, lengths, table, slots, state, heads, kv_heads):
        attend(query, cache, tile, size**-0.5, out, masses)

    tolerance = dict(atol=1e-6, rtol=1e-5) if dtype == torch.float32 else dict(atol=1e-2, rtol=1e-2)
    for row, (q, own, roles) in enumerate(alone):
        key, value = cache[own].float().transpose(0, 1)[None].split(size, dim=-1)
        bias = torch.zeros(1, len(own))
        bias[:, roles == Role.VISUAL], bias[:, roles == Role.SYSTEM] = batch[row][2], batch[row][3]
        weights = reference.attention_map(q.float().transpose(0, 1)[None], key, bias=bias)
        mass = reference.role_mass(weights, roles[None], [Role.VISUAL, Role.SYSTEM])[0].mean(0)
        wanted = (weights @ value.repeat_interleave(heads // kv_heads, dim=1))[0].transpose(0, 1)
        rows = slice(start[row], start[row + 1])
        torch.testing.assert_close(out[rows].float(), wanted, **tolerance)
        torch.testing.assert_close(masses[rows], mass, atol=1e-6, rtol=1e-5)


def test_scores_add_up_over_layers_at_the_queries_slots():
    state = SlotState(2, BLOCK, np.zeros((2 * BLOCK, 4), dtype=np.float32))
    slots = torch.tensor([6, 1])
    for masses in ([[0.3, 0.1], [0.0, 0.5]], [[0.2, 0.2], [0.0, 0.0]]):
        state.add_scores(slots, torch.tensor(masses))
    wanted = torch.tensor([[0.3 / (0.1 + 1e-6) + 1, 1.25, 0.5, 0.3], [0.0, 0.0, 0.0, 0.5]])
    torch.testing.assert_close(state.scores[slots], wanted, atol=1e-5, rtol=1e-5)
    assert not state.scores[[0, 2, 3, 4, 5, 7]].any()


def test_a_block_given_to_another_request_forgets_the_first():
    state = SlotState(4, BLOCK, np.zeros((4 * BLOCK, 4), dtype=np.float32))
    for prompt, options in (([Role.VISUAL] * 8, RequestOptions(visual_bias=2.0)), ([Role.SYSTEM], RequestOptions())):
        marks = BlockMarks()
        marks.add([2, 1], 0, np.array(prompt, dtype=np.uint8), options, BLOCK)
        state.mark(marks)
    assert state.roles[8:12].tolist() == [Role.SYSTEM] + [Role.RESPONSE] * 3
    assert state.roles[4:8].tolist() == [Role.RESPONSE] * 4
    assert state.bias_of(torch.tensor([4, 8])).tolist() == [[0, 0], [0, 0]]


def test_later_blocks_of_a_request_continue_its_prompt():
    state = SlotState(4, BLOCK, np.zeros((4 * BLOCK, 4), dtype=np.float32))
    prompt = np.array([Role.SYSTEM] * 4 + [Role.VISUAL, Role.USER], dtype=np.uint8)
    for first, block in ((0, 3), (1, 0)):  # chunked prefill: the second block comes in a later step
        marks = BlockMarks()
        marks.add([block], first, prompt, RequestOptions(), BLOCK)
        state.mark(marks)
    assert state.roles[:4].tolist() == [Role.VISUAL, Role.USER, Role.RESPONSE, Role.RESPONSE]
    assert state.roles[12:].tolist() == [Role.SYSTEM] * 4
