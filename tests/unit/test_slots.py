"""What a rank knows of its KV-cache slots: roles and biases of blocks, masses in, scores out."""

import numpy as np
import pytest
import torch

from verl_avar.reward import token_scores
from verl_avar.roles import Role
from verl_avar.rollout.options import RequestOptions
from verl_avar.rollout.slots import BlockMarks, SlotState

BLOCK = 4


def _state(blocks=4, layers=2, heads=3, **changes):
    return SlotState(blocks, BLOCK, layers, 8, heads, torch.full((blocks * BLOCK + 1, 5), -1.0), **changes)


def _begin(state, blocks, first, prompt, options=None):
    marks = BlockMarks()
    marks.add(blocks, first, np.array(prompt, dtype=np.uint8), options or RequestOptions(), BLOCK)
    state.begin(marks)


def test_a_steps_masses_become_the_scores_of_its_queries_slots():
    state, masses = _state(), torch.rand(2, 3, 3, 2)
    state.masses[:, :3] = masses
    state.finish(torch.tensor([6, 1, -1]))
    visual, system = masses.permute(3, 0, 2, 1)  # [L, H, tokens]
    torch.testing.assert_close(state.scores[[6, 1]], token_scores(visual, system)[:, :2].T)
    assert (state.scores[[0, 2, 3, 4, 5, *range(7, 16)]] == -1).all()  # a padded token touches no slot


def test_scores_of_one_token_by_hand():
    state = _state(layers=2, heads=2)
    # layer 0: heads (0.3, 0.1) and (0.1, 0.5) of (visual, system); layer 1: (0, 0.5) twice
    state.masses[:, 0] = torch.tensor([[[0.3, 0.1], [0.1, 0.5]], [[0.0, 0.5], [0.0, 0.5]]])
    state.finish(torch.tensor([3]))
    ratio, share, vas = 0.2 / 0.3 / 2, 0.4 / 2, (3 + 0.2) / 2 / 2
    assert state.scores[3].tolist() == pytest.approx([ratio, share, 0.1, 0.4, vas], rel=1e-5)


def test_a_rank_alone_and_ranks_that_share_the_heads_score_the_same():
    masses = torch.rand(2, 8, 4, 2)
    alone = _state(heads=4)
    alone.masses[:] = masses
    slots = torch.arange(8)
    alone.finish(slots)
    parts = []
    second = SlotState(4, BLOCK, 2, 8, 2, None, total_heads=4, all_reduce=parts.append)
    second.masses[:] = masses[:, :, 2:]
    second.finish(slots)
    first = _state(heads=2, total_heads=4, all_reduce=lambda sums: sums + parts[0])
    first.masses[:] = masses[:, :, :2]
    first.finish(slots)
    torch.testing.assert_close(first.scores, alone.scores)


def test_a_block_given_to_another_request_forgets_the_first():
    state = _state()
    for prompt, options in (([Role.VISUAL] * 8, RequestOptions(visual_bias=2.0)), ([Role.SYSTEM], RequestOptions())):
        _begin(state, [2, 1], 0, prompt, options)
    assert state.roles[8:12].tolist() == [Role.SYSTEM] + [Role.RESPONSE] * 3
    assert state.roles[4:8].tolist() == [Role.RESPONSE] * 4
    assert state.bias_of(torch.tensor([4, 8])).tolist() == [[0, 0], [0, 0]]


def test_later_blocks_of_a_request_continue_its_prompt():
    state = _state()
    prompt = [Role.SYSTEM] * 4 + [Role.VISUAL, Role.USER]
    for first, block in ((0, 3), (1, 0)):  # chunked prefill: the second block comes in a later step
        _begin(state, [block], first, prompt)
    assert state.roles[:4].tolist() == [Role.VISUAL, Role.USER, Role.RESPONSE, Role.RESPONSE]
    assert state.roles[12:].tolist() == [Role.SYSTEM] * 4


def test_what_a_steps_first_layer_made_serves_the_others_of_that_step_only():
    state, made = _state(), iter(range(9))
    assert [state.of_step("x", lambda: next(made)) for _ in range(3)] == [0, 0, 0]
    state.begin(BlockMarks())
    assert state.of_step("x", lambda: next(made)) == 1


def test_what_an_engines_first_layer_made_outlives_the_step():
    state, made = _state(), iter(range(9))
    assert state.of_engine("x", lambda: next(made)) == 0
    state.begin(BlockMarks())
    assert state.of_engine("x", lambda: next(made)) == 0
