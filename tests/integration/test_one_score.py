"""One sample, one visual-attention score: vLLM's rollout, the trainer's engine and the offline tool agree."""

import pandas as pd
import pytest
import torch
from test_training_engine import build_engine  # noqa: F401  (a fixture)
from training_engines import infer

from verl_avar.evaluation.answer import answer, answer_masses
from verl_avar.evaluation.checkpoint import load_checkpoint
from verl_avar.miniature import base_path
from verl_avar.miniature.data import write_eval
from verl_avar.reward import visual_scores
from verl_avar.roles import Role
from verl_avar.rollout import kv_transfer_config

NEW_TOKENS = 80
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def model_folder():
    return base_path()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return pd.read_parquet(write_eval(tmp_path_factory.mktemp("rows") / "eval.parquet", 2, seed=5))


@pytest.fixture(scope="module")
def offline(model_folder, rows):
    """Texts and scores of greedy answers, by transformers in one batch."""
    checkpoint = load_checkpoint(model_folder)
    answers = answer(checkpoint, list(rows["prompt"]), list(rows["images"]), NEW_TOKENS)
    record = answer_masses(checkpoint, answers)
    scores = visual_scores(record.mass(Role.VISUAL), record.mass(Role.SYSTEM), answers.roles, tokens=True)
    assert all(score.ratio > 0 and score.n > 2 for score in scores)
    return answers.texts, scores


@pytest.fixture(scope="module")
def rollouts(model_folder, rows):
    """The same answers by vLLM with the connector."""
    from vllm import LLM, SamplingParams

    from verl_avar.evaluation.checkpoint import open_images

    llm = LLM(
        str(model_folder),
        dtype="float32",
        max_model_len=256,
        enforce_eager=True,
        kv_transfer_config=kv_transfer_config(),
    )
    try:
        processor = load_checkpoint(model_folder).processor
        requests = []
        for prompt, images in zip(rows["prompt"], rows["images"], strict=True):
            parts = [{"type": "image"}, {"type": "text", "text": prompt[1]["content"].removeprefix("<image>")}]
            messages = [prompt[0], {"role": "user", "content": parts}]
            text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            requests.append({"prompt": text, "multi_modal_data": {"image": open_images(images)}})
        sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, extra_args={"attention_scores": "tokens"})
        return llm.generate(requests, sampling, use_tqdm=False)
    finally:
        llm.llm_engine.engine_core.shutdown()


def test_rollout_and_offline_tool_agree(offline, rollouts):
    texts, scores = offline
    assert [output.outputs[0].text for output in rollouts] == texts
    for output, score in zip(rollouts, scores, strict=True):
        theirs = output.kv_transfer_params["visual_attention"]
        assert theirs["n"] == score.n
        assert theirs["tokens"] == pytest.approx(score.tokens, abs=TOLERANCE)
        for name in ("ratio", "share", "visual_mass", "system_mass"):
            assert theirs[name] == pytest.approx(getattr(score, name), abs=TOLERANCE), name


def test_engine_and_offline_tool_agree(offline, rows, build_engine, tmp_path):  # noqa: F811
    texts, scores = offline
    messages = [
        [*prompt, {"role": "assistant", "content": text}] for prompt, text in zip(rows["prompt"], texts, strict=True)
    ]
    pd.DataFrame({"messages": messages, "images": rows["images"]}).to_parquet(tmp_path / "sft.parquet")
    output = infer(build_engine(), tmp_path / "sft.parquet", micro_batch_size=4)
    for b, score in enumerate(scores):
        # verl's template ends the turn with a newline after the end marker, which the model never writes: the first n
        # queries that the engine measured are the response's.
        measured = output["visual_ratio"].unbind()[b]
        ours = measured[torch.nonzero(measured).flatten()[0] :][: score.n]
        assert ours.tolist() == pytest.approx(score.tokens, abs=TOLERANCE)
        assert float(ours.mean()) == pytest.approx(score.ratio, abs=TOLERANCE)
