"""The Triton attention kernels on a GPU: the interpreter's grid, and what only a device shows."""

import paged_attention_checks as checks
import pytest
import torch
from paged_attention_grid import CASES, make_step, results

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.mark.parametrize("name", CASES)
def test_output_and_masses_are_those_of_full_attention_maps(name):
    checks.check_case(name, DEVICE)


@pytest.mark.parametrize("seed", range(30))
def test_random_batches_are_those_of_full_attention_maps(seed):
    checks.check_random_batch(seed, DEVICE)


@pytest.mark.parametrize(
    "check",
    [
        checks.check_layers,
        checks.check_far_blocks,
        checks.check_far_write,
        checks.check_write,
        checks.check_refusals,
    ],
)
def test_checks_of_the_interpreter_hold(check):
    check(DEVICE)


@pytest.mark.parametrize("name", ["decode, float16", "mixed, float16, hopper", "short chunk on long context"])
def test_equal_inputs_give_equal_bits(name):
    step = make_step(CASES[name], DEVICE)
    first, second = results(step), results(step)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("name", ["decode, float16", "mixed, no masses", "short chunk on long context"])
def test_a_captured_launch_waits_for_nothing_and_holds_for_other_lengths(name):
    checks.check_other_lengths(name, DEVICE)
