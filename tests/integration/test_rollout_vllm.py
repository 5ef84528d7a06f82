"""One real vLLM engine (CPU, miniature with random weights) against transformers' eager attention.

The engine is small on purpose: prompts are prefilled in chunks, requests are preempted, prefixes are cached.
"""

import random
from itertools import product

import pytest
import torch
from rollouts import ENVIRONMENT, Eager, make_prompt, score_of, wanted_score

from verl_avar.miniature.model import build_model, build_processor, save
from verl_avar.miniature.tasks import TASKS, draw_sample
from verl_avar.miniature.tokenizer import build_tokenizer
from verl_avar.rollout import kv_transfer_config
from verl_avar.rollout.scores import shared_folder

LAYERS, NEW_TOKENS = 3, 24
BLOCK, BLOCKS, CHUNK, SEQUENCES = 32, 22, 32, 16
BIASES = [(0.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.5, -0.5)]  # visual, system


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("miniature")
    tokenizer = build_tokenizer(200)
    save(folder, build_model(tokenizer), build_processor(tokenizer))
    return folder


@pytest.fixture(scope="module")
def engine(checkpoint):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        from vllm import LLM

        llm = LLM(
            str(checkpoint),
            dtype="float32",
            max_model_len=256,
            enforce_eager=True,
            block_size=BLOCK,
            num_gpu_blocks_override=BLOCKS,
            max_num_seqs=SEQUENCES,
            max_num_batched_tokens=CHUNK,
            enable_prefix_caching=True,
            limit_mm_per_prompt={"image": 2, "video": 0},
            disable_log_stats=False,
            kv_transfer_config=kv_transfer_config(),
        )
        yield llm
        llm.llm_engine.engine_core.shutdown()


def _sampling(visual=0.0, system=0.0, **changes):
    from vllm import SamplingParams

    extra = {"visual_bias": visual, "system_bias": system, "attention_scores": "tokens"}
    settings = dict(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0, extra_args=extra)
    return SamplingParams(**settings | changes)


@pytest.fixture(scope="module")
def samples():
    rng = random.Random(0)
    return [draw_sample(task, "train", rng) for task in TASKS]


@pytest.fixture(scope="module")
def batch(engine, samples):
    """(prompt, bias, output) of concurrent requests: every prompt with every bias, first greedy and then sampled."""
    prompts = [make_prompt(samples[0]), make_prompt(samples[1]), make_prompt(samples[2], samples[3])]
    jobs = list(product(prompts, BIASES)) * 2
    # Eager can't replay a sampled placeholder. No seeds: vLLM 0.27's CPU sampler ends the engine when it has to take
    # one back after a prefill chunk.
    ban = {engine.get_tokenizer().convert_tokens_to_ids("<|image_pad|>"): -100}
    params = [
        _sampling(*bias, temperature=float(i >= len(jobs) // 2), logit_bias=ban) for i, (_, bias) in enumerate(jobs)
    ]
    outputs = engine.generate([prompt for prompt, _ in jobs], params, use_tqdm=False)
    return [(prompt, bias, output) for (prompt, bias), output in zip(jobs, outputs, strict=True)]


@pytest.fixture(scope="module")
def eager(checkpoint):
    return Eager(checkpoint)


def test_the_engine_chunked_preempted_and_reused_prefixes(engine, batch):
    counters = {metric.name: getattr(metric, "value", None) for metric in engine.get_metrics()}
    assert counters["vllm:num_preemptions"] > 0
    assert counters["vllm:prefix_cache_hits"] > 0
    assert max(len(output.prompt_token_ids) for *_, output in batch) > CHUNK


def test_log_probs_under_each_requests_bias_equal_eager_attention(batch, eager):
    for asked, bias, output in batch:
        wanted, _ = eager(asked, bias, output)
        answer = output.outputs[0]
        got = [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        torch.testing.assert_close(torch.tensor(got), wanted, atol=1e-4, rtol=0)


def test_scores_equal_eager_attention(batch, eager):
    for asked, bias, output in batch:
        _, masses = eager(asked, bias, output)
        assert masses.shape[2] == NEW_TOKENS
        got, wanted = dict(score_of(output)), wanted_score(masses)
        assert got.pop("tokens") == pytest.approx(wanted.pop("tokens"), rel=1e-4, abs=1e-5)
        assert got == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_the_token_ratios_average_to_the_ratio(batch):
    for *_, output in batch:
        score = score_of(output)
        assert len(score["tokens"]) == score["n"] == len(output.outputs[0].token_ids)
        assert sum(score["tokens"]) / score["n"] == pytest.approx(score["ratio"], rel=1e-6)


def test_a_visual_bias_raises_and_a_system_bias_of_minus_one_lowers_its_mass(batch):
    by_bias = {bias: score_of(output) for _, bias, output in batch[:4]}
    assert by_bias[1.0, 0.0]["visual_mass"] > by_bias[0.0, 0.0]["visual_mass"]
    assert by_bias[0.0, -1.0]["system_mass"] < by_bias[0.0, 0.0]["system_mass"]


def test_the_same_request_alone_and_in_the_batch_scores_the_same(engine, batch):
    for index in (1, 9):
        prompt, bias, output = batch[index]
        (alone,) = engine.generate([prompt], _sampling(*bias), use_tqdm=False)
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids
        assert score_of(alone)["tokens"] == pytest.approx(score_of(output)["tokens"], abs=1e-5)


def test_a_request_without_roles_leaves_the_prefix_that_it_repeats_alone(engine, samples):
    good = make_prompt(samples[0], system="A long system turn, so that whole blocks of it are cached.")
    broken = good | {"prompt": good["prompt"] + "<|im_end|>\n<|im_start|>system\n"}
    alone, _ = engine.generate([good, make_prompt()], _sampling(), use_tqdm=False)
    assert engine.reset_prefix_cache()
    beside, unscored = engine.generate([good, broken], _sampling(), use_tqdm=False)
    assert "a system turn after a user turn" in score_of(unscored)["reason"]
    assert score_of(beside)["tokens"] == pytest.approx(score_of(alone)["tokens"], abs=1e-5)


def test_a_summary_has_no_token_list_and_one_token_is_enough(engine, samples):
    (output,) = engine.generate([make_prompt(samples[0])], _sampling(max_tokens=1, extra_args=None), use_tqdm=False)
    assert set(score_of(output)) == {"ratio", "share", "visual_mass", "system_mass", "vas", "n"}
    assert score_of(output)["n"] == 1


def test_text_only_prompts_have_defined_scores(engine, samples):
    prompts = [make_prompt(), make_prompt(samples[0], system=None), {"prompt": "no chat at all"}]
    text, no_system, no_chat = map(score_of, engine.generate(prompts, _sampling(max_tokens=3), use_tqdm=False))
    assert (text["ratio"], text["share"], text["visual_mass"], text["n"]) == (0.0, 0.0, 0.0, 3)
    assert text["system_mass"] > 0
    assert (no_system["ratio"], no_system["share"], no_system["vas"]) == (None, None, None)
    assert no_system["visual_mass"] > 0
    assert "system turn" in no_system["reason"]
    assert (no_chat["ratio"], no_chat["visual_mass"], no_chat["n"]) == (None, None, 3)
    assert "no turn starts" in no_chat["reason"]


@pytest.mark.parametrize(
    ("prompt", "extra", "complaint"),
    [
        (make_prompt(), {"visual_bias": float("inf")}, "visual_bias must be finite"),
        (make_prompt(), {"attention_scores": "maps"}, "attention_scores must be one of"),
        (make_prompt(), {"visual_boost": 1}, "unknown option 'visual_boost'"),
        ({"prompt": "no chat at all"}, {"visual_bias": 1.0}, "no turn starts"),
    ],
)
def test_a_bad_request_is_refused_and_the_engine_lives_on(engine, prompt, extra, complaint):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=complaint):
        engine.generate([prompt], _sampling(extra_args=extra), use_tqdm=False)
    (output,) = engine.generate([make_prompt()], _sampling(max_tokens=1), use_tqdm=False)
    assert score_of(output)["n"] == 1


def test_a_running_engine_leaves_no_score_file(engine):
    engine_id = engine.llm_engine.vllm_config.kv_transfer_config.engine_id
    assert not list(shared_folder().glob(f"avar-scores-{engine_id}*"))
