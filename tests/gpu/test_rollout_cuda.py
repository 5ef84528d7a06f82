"""The GPU backend on a GPU: real CUDA graphs, memory that GPU and scheduler share, and vLLM engines against eager
attention. Skipped without a CUDA device; engines also without a vLLM that was built for CUDA."""

import random
import subprocess
import sys
from itertools import product

import backend_gpu_steps as steps
import pytest
import torch
from rollouts import Eager, make_prompt, score_of, wanted_score

from verl_avar.miniature.model import build_model, build_processor, save
from verl_avar.miniature.tasks import TASKS, draw_sample
from verl_avar.miniature.tokenizer import build_tokenizer
from verl_avar.rollout import kv_transfer_config

pytestmark = pytest.mark.gpu

PRECISIONS = [(torch.float32, 1e-4), (torch.float16, 5e-3), (torch.bfloat16, 3e-2)]
BLOCK, BLOCKS, CHUNK, SEQUENCES, NEW_TOKENS = 16, 40, 32, 16, 24
BIASES = [(0.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.5, -0.5)]  # visual, system
# Of log-probs, of a token's ratio, of an answer's figures (relative). Eager attention in half precision is off by up to
# 0.04, 0.03 and 0.001 on such prompts itself; float32 leaves room for other matrix products.
TOLERANCE = {"float32": (2e-3, 2e-3, 1e-3), "float16": (0.15, 0.1, 1e-2), "bfloat16": (0.2, 0.15, 2e-2)}


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("side_by_side", [False, True])
def test_outputs_and_scores_of_chunks_and_decodes_are_those_of_attention_maps(dtype, tolerance, side_by_side):
    steps.check_steps(side_by_side, "cuda", dtype, tolerance)


def _captured(run):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # kernels are compiled outside of a capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("probed", [(0, 1, 2), (1,)])
def test_a_captured_dummy_step_replays_real_ones(dtype, tolerance, probed):
    steps.check_graph(_captured, "cuda", dtype, tolerance, probed)


def test_marks_are_written_without_waiting_for_the_device():
    layers = steps.Layers("cuda")
    request = steps.Request((0.5, 0.0), [3, 7])
    torch.cuda.set_sync_debug_mode("error")
    try:
        from verl_avar.rollout.options import RequestOptions
        from verl_avar.rollout.slots import BlockMarks

        marks = BlockMarks()
        marks.add(request.blocks, 0, steps.np.uint8(request.prompt), RequestOptions(*request.bias), steps.BLOCK)
        layers.state.begin(marks)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert layers.state.roles.view(-1, steps.BLOCK)[3].tolist() == request.prompt[: steps.BLOCK]
    assert layers.state.bias[[3, 7]].tolist() == [[0.5, 0.0]] * 2


def test_another_process_reads_what_the_gpu_wrote():
    from verl_avar.rollout import pinned
    from verl_avar.rollout.scores import SharedScores

    read = (
        "import sys; from verl_avar.rollout.scores import SharedScores; shared = SharedScores.open(sys.argv[1]); "
        "print('open', flush=True); sys.stdin.readline(); print(shared.array[[2, 5]].tolist())"
    )
    writer = SharedScores.create("test-pinned", 8)
    reader = subprocess.Popen(
        [sys.executable, "-c", read, "test-pinned"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert reader.stdout.readline() == "open\n"
        view = pinned.view_from(torch.device("cuda"), writer.array)
        assert view.is_cuda
        view.index_copy_(0, torch.tensor([2, 5], device="cuda"), torch.arange(10.0, device="cuda").view(2, 5))
        torch.cuda.current_stream().record_event().synchronize()
        out, _ = reader.communicate("read\n", timeout=60)
        assert out.strip() == str([[0.0, 1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0, 9.0]])
        pinned.release(view, writer.array)
    finally:
        reader.kill()
        reader.wait()
        writer.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("miniature"), build_tokenizer(200)
    save(folder, build_model(tokenizer), build_processor(tokenizer))
    return folder


@pytest.fixture(scope="module")
def jobs():
    rng = random.Random(0)
    samples = [draw_sample(task, "train", rng) for task in TASKS]
    prompts = [make_prompt(samples[0]), make_prompt(samples[1]), make_prompt(samples[2], samples[3])]
    return list(product(prompts, BIASES)) * 2


@pytest.fixture(
    scope="module",
    params=[("float32", True), ("float32", False), ("bfloat16", True), ("bfloat16", False), ("float16", False)],
    ids=lambda param: f"{param[0]}, {'eager' if param[1] else 'CUDA graphs'}",
)
def engine(request, checkpoint):
    """(engine, dtype): prompts in chunks, room for few requests. Graphs are vLLM's default: full for decodes, else
    piecewise."""
    from vllm import LLM
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        pytest.skip("this vLLM was not built for CUDA")
    dtype, eager = request.param
    llm = LLM(
        str(checkpoint),
        dtype=dtype,
        max_model_len=256,
        enforce_eager=eager,
        block_size=BLOCK,
        num_gpu_blocks_override=BLOCKS,
        gpu_memory_utilization=0.3,
        max_num_seqs=SEQUENCES,
        max_num_batched_tokens=CHUNK,
        enable_prefix_caching=True,
        limit_mm_per_prompt={"image": 2, "video": 0},
        disable_log_stats=False,
        kv_transfer_config=kv_transfer_config(attention_scores="tokens"),
    )
    assert llm.llm_engine.vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs() is not eager
    yield llm, dtype
    llm.llm_engine.engine_core.shutdown()


def test_engines_agree_with_eager_attention(engine, checkpoint, jobs):
    from vllm import SamplingParams

    llm, dtype = engine
    ban = {llm.get_tokenizer().convert_tokens_to_ids("<|image_pad|>"): -100}
    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=NEW_TOKENS,
            ignore_eos=True,
            logprobs=0,
            logit_bias=ban,
            extra_args={"visual_bias": visual, "system_bias": system},
        )
        for _, (visual, system) in jobs
    ]
    outputs = llm.generate([prompt for prompt, _ in jobs], params, use_tqdm=False)
    counters = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    assert counters["vllm:num_preemptions"] > 0
    assert counters["vllm:prefix_cache_hits"] > 0

    eager = Eager(checkpoint)
    of_log_probs, of_tokens, of_figures = TOLERANCE[dtype]
    for (prompt, bias), output in zip(jobs, outputs, strict=True):
        log_probs, masses = eager(prompt, bias, output)
        answer = output.outputs[0]
        got = [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        torch.testing.assert_close(torch.tensor(got), log_probs, atol=of_log_probs, rtol=0)
        score, wanted = dict(score_of(output)), wanted_score(masses)
        tokens = torch.tensor(score.pop("tokens")), torch.tensor(wanted.pop("tokens"))
        torch.testing.assert_close(*tokens, atol=of_tokens, rtol=of_figures)
        assert score == pytest.approx(wanted, rel=of_figures)
