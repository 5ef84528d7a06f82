"""One real vLLM engine (CPU, miniature with random weights) against transformers' eager attention.

The engine is small on purpose: prompts are prefilled in chunks, requests are preempted, prefixes are cached.
"""

import random
from itertools import product

import pytest
import torch

from verl_avar.miniature.model import build_model, build_processor, load, save
from verl_avar.miniature.tasks import TASKS, draw_sample
from verl_avar.miniature.tokenizer import build_tokenizer
from verl_avar.roles import ChatTokens, Role, token_roles
from verl_avar.rollout import kv_transfer_config
from verl_avar.rollout.scores import shared_folder

LAYERS, NEW_TOKENS = 3, 24
BLOCK, BLOCKS, CHUNK, SEQUENCES = 16, 40, 32, 16
BIASES = [(0.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.5, -0.5)]  # visual, system
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_HOST_IP": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


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


def _prompt(*samples, system="Look at the image."):
    images = "<|vision_start|><|image_pad|><|vision_end|>" * len(samples)
    turn = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    text = f"{turn}<|im_start|>user\n{images}What is where?<|im_end|>\n<|im_start|>assistant\n"
    return {"prompt": text} | ({"multi_modal_data": {"image": [sample.image for sample in samples]}} if samples else {})


def _sampling(visual=0.0, system=0.0, **changes):
    from vllm import SamplingParams

    extra = {"visual_bias": visual, "system_bias": system, "attention_scores": "tokens"}
    settings = dict(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0, extra_args=extra)
    return SamplingParams(**settings | changes)


def _score(output):
    return output.kv_transfer_params["visual_attention"]


@pytest.fixture(scope="module")
def samples():
    rng = random.Random(0)
    return [draw_sample(task, "train", rng) for task in TASKS]


@pytest.fixture(scope="module")
def batch(engine, samples):
    """(prompt, bias, output) of concurrent requests: every prompt with every bias, first greedy and then sampled."""
    prompts = [_prompt(samples[0]), _prompt(samples[1]), _prompt(samples[2], samples[3])]
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
    """eager(prompt, bias, output) -> log-probs [n] of the response, masses [L, H, n, 2] of the queries before it."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import eager_attention_forward

    maps, key_bias = [], None

    def biased(module, query, key, value, attention_mask, **kwargs):
        out, weights = eager_attention_forward(module, query, key, value, attention_mask + key_bias, **kwargs)
        maps.append(weights)
        return out, weights

    AttentionInterface.register("test_biased_eager", biased)
    AttentionMaskInterface.register("test_biased_eager", eager_mask)
    model, processor = load(checkpoint)
    model.set_attn_implementation({"text_config": "test_biased_eager", "vision_config": "sdpa"})
    chat = ChatTokens.from_tokenizer(processor, model.config)

    def run(prompt, bias, output):
        nonlocal key_bias
        images = prompt.get("multi_modal_data", {}).get("image")
        inputs = processor(text=[prompt["prompt"]], images=images, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == output.prompt_token_ids
        answer = torch.tensor([output.outputs[0].token_ids])
        ids = torch.cat((inputs["input_ids"], answer), dim=1)
        roles = token_roles(inputs["input_ids"], chat)[0]
        roles = torch.cat((roles, torch.full((answer.shape[1],), Role.RESPONSE)))
        key_bias = bias[0] * (roles == Role.VISUAL) + bias[1] * (roles == Role.SYSTEM)
        pixels = {key: inputs[key] for key in ("pixel_values", "image_grid_thw") if key in inputs}
        kinds = (ids == model.config.image_token_id).int()
        maps.clear()
        with torch.no_grad():
            logits = model(input_ids=ids, mm_token_type_ids=kinds, **pixels).logits
        asked = slice(inputs["input_ids"].shape[1] - 1, ids.shape[1] - 1)
        log_probs = logits[0, asked].log_softmax(-1).gather(1, answer.T)[:, 0]
        weights = torch.stack(maps)[:, 0, :, asked]  # [L, H, n, T]
        masses = [weights[..., roles == role].sum(-1) for role in (Role.VISUAL, Role.SYSTEM)]
        return log_probs, torch.stack(masses, dim=-1)

    return run


def test_the_engine_chunked_preempted_and_reused_prefixes(engine, batch):
    counters = {metric.name: getattr(metric, "value", None) for metric in engine.get_metrics()}
    assert counters["vllm:num_preemptions"] > 0
    assert counters["vllm:prefix_cache_hits"] > 0
    assert max(len(output.prompt_token_ids) for *_, output in batch) > CHUNK


def test_log_probs_under_each_requests_bias_equal_eager_attention(batch, eager):
    for prompt, bias, output in batch:
        wanted, _ = eager(prompt, bias, output)
        answer = output.outputs[0]
        got = [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        torch.testing.assert_close(torch.tensor(got), wanted, atol=1e-4, rtol=0)


def test_scores_equal_eager_attention(batch, eager):
    for prompt, bias, output in batch:
        _, masses = eager(prompt, bias, output)
        by_head = masses[..., 0] / (masses[..., 1] + 1e-6)
        visual, system = masses.mean(1).unbind(-1)
        score = _score(output)
        ratios = (visual / (system + 1e-6)).mean(0)
        torch.testing.assert_close(torch.tensor(score["tokens"]), ratios, atol=1e-5, rtol=1e-4)
        wanted = {
            "ratio": ratios.mean().item(),
            "share": (visual / (visual + system)).mean().item(),
            "visual_mass": visual.mean().item(),
            "system_mass": system.mean().item(),
            "vas": by_head.mean().item(),
        }
        assert {name: score[name] for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        assert score["n"] == NEW_TOKENS


def test_the_token_ratios_average_to_the_ratio(batch):
    for *_, output in batch:
        score = _score(output)
        assert len(score["tokens"]) == score["n"] == len(output.outputs[0].token_ids)
        assert sum(score["tokens"]) / score["n"] == pytest.approx(score["ratio"], rel=1e-6)


def test_a_visual_bias_raises_and_a_system_bias_of_minus_one_lowers_its_mass(batch):
    by_bias = {bias: _score(output) for _, bias, output in batch[:4]}
    assert by_bias[1.0, 0.0]["visual_mass"] > by_bias[0.0, 0.0]["visual_mass"]
    assert by_bias[0.0, -1.0]["system_mass"] < by_bias[0.0, 0.0]["system_mass"]


def test_the_same_request_alone_and_in_the_batch_scores_the_same(engine, batch):
    for index in (1, 9):
        prompt, bias, output = batch[index]
        (alone,) = engine.generate([prompt], _sampling(*bias), use_tqdm=False)
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids
        assert _score(alone)["tokens"] == pytest.approx(_score(output)["tokens"], abs=1e-5)


def test_a_request_without_roles_leaves_the_prefix_that_it_repeats_alone(engine, samples):
    good = _prompt(samples[0], system="A long system turn, so that whole blocks of it are cached.")
    broken = good | {"prompt": good["prompt"] + "<|im_end|>\n<|im_start|>system\n"}
    alone, _ = engine.generate([good, _prompt()], _sampling(), use_tqdm=False)
    assert engine.reset_prefix_cache()
    beside, unscored = engine.generate([good, broken], _sampling(), use_tqdm=False)
    assert "a system turn after a user turn" in _score(unscored)["reason"]
    assert _score(beside)["tokens"] == pytest.approx(_score(alone)["tokens"], abs=1e-5)


def test_a_summary_has_no_token_list_and_one_token_is_enough(engine, samples):
    (output,) = engine.generate([_prompt(samples[0])], _sampling(max_tokens=1, extra_args=None), use_tqdm=False)
    assert set(_score(output)) == {"ratio", "share", "visual_mass", "system_mass", "vas", "n"}
    assert _score(output)["n"] == 1


def test_text_only_prompts_have_defined_scores(engine, samples):
    prompts = [_prompt(), _prompt(samples[0], system=None), {"prompt": "no chat at all"}]
    text, no_system, no_chat = map(_score, engine.generate(prompts, _sampling(max_tokens=3), use_tqdm=False))
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
        (_prompt(), {"visual_bias": float("inf")}, "visual_bias must be finite"),
        (_prompt(), {"attention_scores": "maps"}, "attention_scores must be one of"),
        (_prompt(), {"visual_boost": 1}, "unknown option 'visual_boost'"),
        ({"prompt": "no chat at all"}, {"visual_bias": 1.0}, "no turn starts"),
    ],
)
def test_a_bad_request_is_refused_and_the_engine_lives_on(engine, prompt, extra, complaint):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=complaint):
        engine.generate([prompt], _sampling(extra_args=extra), use_tqdm=False)
    (output,) = engine.generate([_prompt()], _sampling(max_tokens=1), use_tqdm=False)
    assert _score(output)["n"] == 1


def test_a_running_engine_leaves_no_score_file(engine):
    engine_id = engine.llm_engine.vllm_config.kv_transfer_config.engine_id
    assert not list(shared_folder().glob(f"avar-scores-{engine_id}*"))
