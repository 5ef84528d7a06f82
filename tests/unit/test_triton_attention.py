"""The Triton attention kernels: interpreted in numpy against full attention maps, and compiled for GPUs.

Kernels decide how they run when triton is imported, so each kind has a process of its own.
"""

import importlib.util
import runpy
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import paged_attention_checks as checks
import pytest
import torch
from paged_attention_grid import CASES

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.fixture(scope="module")
def interpreted():
    """Runs a check in a process that interprets kernels."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=checks.interpret) as pool:
        yield lambda check, *arguments: pool.submit(check, *arguments).result()


@pytest.mark.parametrize("name", CASES)
def test_output_and_masses_are_those_of_full_attention_maps(interpreted, name):
    interpreted(checks.check_case, name)


@pytest.mark.parametrize("seed", range(4))
def test_random_batches_are_those_of_full_attention_maps(interpreted, seed):
    interpreted(checks.check_random_batch, seed)


@pytest.mark.parametrize("name", ["decode, float16", "short chunk on long context"])
def test_a_launch_holds_for_other_lengths(interpreted, name):
    interpreted(checks.check_other_lengths, name)


def test_layers_share_a_workspace(interpreted):
    interpreted(checks.check_layers)


def test_a_cache_of_more_than_2_to_31_elements_is_read(interpreted):
    interpreted(checks.check_far_blocks)


def test_a_cache_of_more_than_2_to_31_elements_is_written(interpreted):
    interpreted(checks.check_far_write)


def test_keys_and_values_land_in_their_slots(interpreted):
    interpreted(checks.check_write)


def test_what_the_kernels_do_not_take_is_refused_by_name(interpreted):
    interpreted(checks.check_refusals)


@pytest.fixture(scope="module")
def compiling(tmp_path_factory):
    """Runs a check in a process that compiles kernels and runs none."""
    cache = str(tmp_path_factory.mktemp("triton"))
    with ProcessPoolExecutor(1, get_context("spawn"), checks.compile_only, (cache,)) as pool:
        yield lambda check, *arguments: pool.submit(check, *arguments).result()


@pytest.mark.parametrize(
    "model,step,capability,probed",
    [
        ("qwen2.5-vl-7b", "decode-8x1k", 90, True),
        ("qwen2.5-vl-7b", "prefill-1x4k", 90, True),
        ("qwen2.5-vl-7b", "prefill-1x4k", 80, False),
        ("gemma-3-4b", "prefill-1x4k", 80, True),
        ("smolvlm-2b", "decode-256x1k", 80, False),
    ],
)
def test_kernels_compile_for_gpus_without_spilling(compiling, model, step, capability, probed):
    compiling(checks.check_compiled, model, step, capability, probed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_benchmark_says_that_it_needs_a_device():
    script = Path(__file__).resolve().parent.parent / "benchmarks" / "paged_attention.py"
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        runpy.run_path(str(script))["main"]([])
