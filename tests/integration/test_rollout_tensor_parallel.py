"""Two tensor-parallel ranks on a CPU, each with half of the heads: scores and log-probs against eager attention."""

import random

import pytest
import torch
from rollouts import ENVIRONMENT, Eager, make_prompt, score_of, wanted_score
from transformers import Qwen2_5_VLForConditionalGeneration

from verl_avar.miniature.model import build_config, build_processor, save
from verl_avar.miniature.tasks import TASKS, draw_sample
from verl_avar.miniature.tokenizer import build_tokenizer
from verl_avar.rollout import kv_transfer_config
from verl_avar.rollout.scores import shared_folder

PROBED = [0, 2]  # of three layers
BIASES = [(0.0, 0.0), (0.7, -0.4)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The miniature with heads that two ranks can share: four query heads, two key heads."""
    folder, tokenizer = tmp_path_factory.mktemp("shared_heads"), build_tokenizer(200)
    config = build_config(tokenizer)
    text = config.text_config
    text.hidden_size, text.num_attention_heads, text.num_key_value_heads = 128, 4, 2
    config.vision_config.out_hidden_size = 128
    torch.manual_seed(0)
    save(folder, Qwen2_5_VLForConditionalGeneration(config), build_processor(tokenizer))
    return folder


@pytest.fixture(scope="module")
def tidy():
    """vLLM's CPU ranks leave the memory that they reduce through behind when the engine stops them, with or without
    the connector."""
    before = set(shared_folder().iterdir())
    yield
    for path in set(shared_folder().iterdir()) - before:
        if "-cpushm_" in path.name:
            path.unlink()


@pytest.fixture(scope="module")
def outputs(checkpoint, tidy):
    from vllm import LLM, SamplingParams

    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        llm = LLM(
            str(checkpoint),
            dtype="float32",
            max_model_len=256,
            enforce_eager=True,
            tensor_parallel_size=2,
            num_gpu_blocks_override=40,
            limit_mm_per_prompt={"image": 1, "video": 0},
            kv_transfer_config=kv_transfer_config(attention_scores="tokens", attention_layers=PROBED),
        )
        rng = random.Random(0)
        prompts = [make_prompt(draw_sample(task, "train", rng)) for task in TASKS]
        jobs = [(prompt, bias) for prompt in prompts for bias in BIASES]
        ban = {llm.get_tokenizer().convert_tokens_to_ids("<|image_pad|>"): -100}
        params = [
            SamplingParams(
                temperature=0.0,
                max_tokens=8,
                ignore_eos=True,
                logprobs=0,
                logit_bias=ban,
                extra_args={"visual_bias": visual, "system_bias": system},
            )
            for _, (visual, system) in jobs
        ]
        answers = llm.generate([prompt for prompt, _ in jobs], params, use_tqdm=False)
        llm.llm_engine.engine_core.shutdown()
        return [(*job, answer) for job, answer in zip(jobs, answers, strict=True)]


def test_two_ranks_share_the_heads_and_score_like_eager_attention(checkpoint, outputs):
    eager = Eager(checkpoint)
    for prompt, bias, output in outputs:
        log_probs, masses = eager(prompt, bias, output)
        answer = output.outputs[0]
        got = [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        assert got == pytest.approx(log_probs.tolist(), abs=1e-4)
        scores, wanted = dict(score_of(output)), wanted_score(masses[PROBED])
        assert scores.pop("tokens") == pytest.approx(wanted.pop("tokens"), rel=1e-4, abs=1e-5)
        assert scores == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_pipeline_parallelism_is_refused_by_name(checkpoint):
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    from vllm.engine.arg_utils import EngineArgs

    from verl_avar.rollout.connector import VisualAttentionConnector

    config = EngineArgs(
        str(checkpoint), dtype="float32", kv_transfer_config=kv_transfer_config()
    ).create_engine_config()
    config.parallel_config.pipeline_parallel_size = 2
    with pytest.raises(NotImplementedError, match="pipeline_parallel_size > 1"):
        VisualAttentionConnector(config, KVConnectorRole.SCHEDULER)
