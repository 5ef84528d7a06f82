"""The GPU backend's layers, their kernels interpreted in numpy, against naive attention; and what vLLM asks of them.

Kernels decide how they run when triton is imported, so the interpreted ones have a process of their own.
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace

import backend_gpu_steps as steps
import numpy as np
import pytest
import torch

from verl_avar.rollout import kv_transfer_config


@pytest.fixture(scope="module")
def interpreted():
    """Runs a check of the steps in a process that interprets kernels."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=steps.interpret) as pool:
        yield lambda check, *arguments: pool.submit(check, *arguments).result()


@pytest.mark.parametrize("side_by_side", [False, True])
def test_outputs_and_scores_of_chunks_and_decodes_are_those_of_attention_maps(interpreted, side_by_side):
    interpreted(steps.check_steps, side_by_side)


def test_only_probed_layers_are_scored(interpreted):
    interpreted(steps.check_probed_layers)


def test_an_engine_that_slept_answers_as_before(interpreted):
    interpreted(steps.check_sleep)


def test_before_the_connector_has_a_cache_attention_is_plain(interpreted):
    interpreted(steps.check_without_connector)


def test_a_step_larger_than_the_masses_is_refused(interpreted):
    interpreted(steps.check_room_for_masses)


def record(run):
    from recorded import Recording

    from verl_avar.rollout import triton_cache, triton_kernels

    kernels = [(triton_cache, "write_kernel"), (triton_kernels, "attention_kernel"), (triton_kernels, "reduce_kernel")]
    with Recording(kernels) as recording:
        run()
    return recording.replay


@pytest.mark.parametrize("probed", [(0, 1, 2), (1,)])
def test_a_graph_of_a_dummy_step_replays_real_ones(interpreted, probed):
    interpreted(steps.check_graph, record, "cpu", torch.float32, 1e-5, probed)


def test_a_profiling_run_without_metadata_gives_zeros():
    from verl_avar.rollout.backend_gpu import PagedRoleAttention

    layer, output = PagedRoleAttention(4, 32, 1.0, 2), torch.full((3, 4, 32), torch.nan)
    assert (layer.forward(None, output, None, None, torch.tensor([]), None, output) == 0).all()


@pytest.mark.parametrize(
    ("feature", "name"),
    [
        ({"sliding_window": 64}, "sliding_window"),
        ({"alibi_slopes": [0.5]}, "alibi_slopes"),
        ({"logits_soft_cap": 30.0}, "logits_soft_cap"),
        ({"sinks": torch.ones(4)}, "sinks"),
        ({"kv_cache_dtype": "fp8"}, "KV cache of type fp8"),
        ({"attn_type": "encoder_only"}, "attention type encoder_only"),
        ({"kv_sharing_target_layer_name": "layers.0"}, "kv_sharing"),
    ],
)
def test_a_layer_that_the_kernels_lack_is_refused_by_name(feature, name):
    from verl_avar.rollout.backend_gpu import PagedRoleAttention

    with pytest.raises(NotImplementedError, match=name):
        PagedRoleAttention(4, 32, 1.0, 2, **feature)


def _builder(**other):
    from verl_avar.rollout.backend_gpu import PagedRoleAttention, PagedRoleMetadataBuilder

    layer = SimpleNamespace(impl=PagedRoleAttention(4, 32, 1.0, 2))
    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(**kv_transfer_config() | other),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        compilation_config=SimpleNamespace(static_forward_context={"layers.0": layer}),
    )
    return PagedRoleMetadataBuilder(None, ["layers.0"], config, torch.device("cpu"))


def test_non_causal_attention_is_refused_by_name():
    with pytest.raises(NotImplementedError, match="non-causal"):
        _builder().build(0, SimpleNamespace(causal=False))


def test_an_engine_with_another_connector_that_got_our_backend_is_told_so():
    with pytest.raises(RuntimeError, match="two processes"):
        _builder(kv_connector="ExampleConnector")


def test_full_graphs_are_captured_for_decodes_alone():
    from vllm.v1.attention.backend import AttentionCGSupport

    from verl_avar.rollout.backend_gpu import PagedRoleMetadataBuilder

    assert PagedRoleMetadataBuilder.get_cudagraph_support(None, None) is AttentionCGSupport.UNIFORM_BATCH


def test_scores_on_a_cpu_are_the_shared_memory_itself():
    from verl_avar.rollout import pinned

    array = np.zeros((3, 5), dtype=np.float32)
    view = pinned.view_from(torch.device("cpu"), array)
    view[1] = 2.0
    assert array[1].tolist() == [2.0] * 5
    pinned.release(view, array)


def test_memory_that_cuda_can_not_map_is_an_error(monkeypatch):
    from verl_avar.rollout import pinned

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=lambda *_: 801))
    with pytest.raises(RuntimeError, match="cudaHostRegister: error 801"):
        pinned.view_from(torch.device("cuda"), np.zeros((3, 5), dtype=np.float32))
