"""The GPU backend in a real engine on the CPU: connector, backend and interpreted kernels against eager attention.

The engine is vLLM's CPU engine, given our GPU backend where it would take its own. It runs in a process of its own,
which is told before Triton is imported to interpret kernels. It is small on purpose: prompts are prefilled in chunks,
requests are preempted, prefixes are cached.
"""

import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from rollouts import ENVIRONMENT, Eager, make_prompt, score_of, wanted_score
from transformers import Qwen2_5_VLForConditionalGeneration

from verl_avar.miniature.model import build_config, build_processor, save
from verl_avar.miniature.tasks import TASKS, draw_sample
from verl_avar.miniature.tokenizer import build_tokenizer
from verl_avar.rollout import kv_transfer_config

BLOCK, BLOCKS, CHUNK, REQUESTS, NEW_TOKENS = 16, 12, 32, 4, 20
BIASES = [(0.0, 0.0), (0.7, -0.4)]  # visual, system
IN_THIS_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TRITON_INTERPRET": "1"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The miniature with two query heads on one key head, and two layers: an interpreter is slow."""
    folder, tokenizer = tmp_path_factory.mktemp("grouped_heads"), build_tokenizer(200)
    config = build_config(tokenizer)
    text = config.text_config
    text.hidden_size, text.num_attention_heads, text.num_key_value_heads = 64, 2, 1
    text.num_hidden_layers, text.layer_types = 2, text.layer_types[:2]
    config.vision_config.out_hidden_size = 64
    torch.manual_seed(0)
    save(folder, Qwen2_5_VLForConditionalGeneration(config), build_processor(tokenizer))
    return folder


def _answer(checkpoint, jobs):
    """(prompt, bias) jobs, all at once, then the first one again. Returns outputs and vLLM's counters."""
    from vllm import LLM, SamplingParams

    from verl_avar.rollout import backend_choice
    from verl_avar.rollout.backend_gpu import PagedRoleBackend

    backend_choice.CpuAttentionBackend = PagedRoleBackend
    llm = LLM(
        str(checkpoint),
        dtype="float32",
        max_model_len=128,
        enforce_eager=True,
        block_size=BLOCK,
        num_gpu_blocks_override=BLOCKS,
        max_num_seqs=REQUESTS,
        max_num_batched_tokens=CHUNK,
        enable_prefix_caching=True,
        limit_mm_per_prompt={"image": 1, "video": 0},
        disable_log_stats=False,
        kv_transfer_config=kv_transfer_config(attention_scores="tokens"),
    )
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
    outputs += llm.generate([jobs[0][0]], params[:1], use_tqdm=False)
    counters = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    llm.llm_engine.engine_core.shutdown()
    return outputs, counters


@pytest.fixture(scope="module")
def answers(checkpoint):
    """(prompt, bias, output) of each job, and the engine's counters."""
    rng = random.Random(0)
    prompts = [make_prompt(draw_sample(task, "train", rng)) for task in TASKS[:2]]
    jobs = [(prompt, bias) for prompt in prompts for bias in BIASES]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (ENVIRONMENT | IN_THIS_PROCESS).items():
            patch.setenv(name, value)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as engine:
            outputs, counters = engine.submit(_answer, checkpoint, jobs).result()
    jobs.append(jobs[0])
    return [(*job, output) for job, output in zip(jobs, outputs, strict=True)], counters


def test_the_engine_chunked_preempted_and_reused_prefixes(answers):
    jobs, counters = answers
    assert counters["vllm:num_preemptions"] > 0
    assert counters["vllm:prefix_cache_hits"] > 0
    assert max(len(output.prompt_token_ids) for *_, output in jobs) > CHUNK


def test_log_probs_and_scores_under_each_requests_bias_equal_eager_attention(checkpoint, answers):
    eager = Eager(checkpoint)
    for prompt, bias, output in answers[0]:
        log_probs, masses = eager(prompt, bias, output)
        answer = output.outputs[0]
        got = [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        torch.testing.assert_close(torch.tensor(got), log_probs, atol=1e-4, rtol=0)
        score, wanted = score_of(output), wanted_score(masses)
        tokens = torch.tensor(score.pop("tokens")), torch.tensor(wanted.pop("tokens"))
        torch.testing.assert_close(*tokens, atol=1e-5, rtol=1e-4)
        assert score == pytest.approx(wanted, rel=1e-4, abs=1e-5)
