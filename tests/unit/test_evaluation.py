"""Answers, masses and figures of a checkpoint, on the miniature with random weights."""

import functools

import pandas as pd
import pytest
import torch

from verl_avar.attention import reference
from verl_avar.attention.hf import set_attention
from verl_avar.attention.mass import MASS_ROLES
from verl_avar.evaluation.answer import answer, answer_masses, attention_only
from verl_avar.evaluation.checkpoint import load_checkpoint, prompt_inputs
from verl_avar.evaluation.evaluate import evaluate, shuffled_images
from verl_avar.evaluation.heatmap import heatmap_sample, sentences
from verl_avar.miniature.data import write_eval
from verl_avar.miniature.model import build_model, build_processor, save
from verl_avar.miniature.tokenizer import build_tokenizer
from verl_avar.roles import Role, query_mask


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer(samples=200)
    save(folder, build_model(tokenizer, seed=1), build_processor(tokenizer))
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return pd.read_parquet(write_eval(tmp_path_factory.mktemp("rows") / "eval.parquet", 3, seed=0))


@pytest.fixture(scope="module")
def checkpoint(folder):
    return load_checkpoint(folder)


@pytest.fixture(scope="module")
def answers(checkpoint, rows):
    return answer(checkpoint, list(rows["prompt"][:4]), list(rows["images"][:4]), max_new_tokens=12)


def test_roles_of_generated_sequences(checkpoint, answers):
    visual = (answers.roles == Role.VISUAL).sum(-1)
    assert visual.tolist() == [9] * 4  # one visual token a cell
    written = (answers.roles == Role.RESPONSE).sum(-1)
    assert (written > 0).all() and (answers.roles[:, : answers.prompt_length] != Role.RESPONSE).all()
    assert query_mask(answers.roles, "response").sum(-1).equal(written)


def test_masses_of_responses_equal_eager_maps(checkpoint, answers):
    record = answer_masses(checkpoint, answers)
    set_attention(checkpoint.model, "avar_eager")
    with torch.no_grad():
        maps = checkpoint.model(**answers.inputs, output_attentions=True).attentions
    set_attention(checkpoint.model, "avar_sdpa")
    asked = query_mask(answers.roles, "user+response")
    for column, role in enumerate(MASS_ROLES):
        expected = torch.stack([reference.role_mass(m, answers.roles, MASS_ROLES)[..., column] for m in maps])
        ours = record.mass(role)
        torch.testing.assert_close(
            ours.transpose(2, 3)[:, asked], expected.transpose(2, 3)[:, asked], atol=1e-5, rtol=1e-4
        )


def test_masses_are_taken_without_logits_and_cache_that_nobody_reads(checkpoint, answers, monkeypatch):
    passed, forward = {}, checkpoint.model.forward
    monkeypatch.setattr(checkpoint.model, "forward", functools.wraps(forward)(lambda **inputs: passed.update(inputs)))
    passed["output"] = forward(**answers.inputs, **attention_only(checkpoint.model))
    assert passed["output"].logits.shape[1] == 1 and passed["output"].past_key_values is None
    answer_masses(checkpoint, answers)
    assert passed["logits_to_keep"] == 1 and passed["use_cache"] is False


def test_a_heatmap_is_the_response_and_its_mass_on_the_image(checkpoint, rows):
    sample = heatmap_sample(checkpoint, rows.iloc[0], 12, "base")
    own = answer(checkpoint, [rows["prompt"].iloc[0]], [rows["images"].iloc[0]], 12)
    written = own.inputs["input_ids"][0, own.prompt_length :].tolist()
    pieces = sentences([checkpoint.tokenizer.decode([i]) for i in written])
    assert "".join(piece for piece, _ in sample.steps).removesuffix("<|im_end|>") == own.texts[0]
    assert all(weights.shape == (3, 3) for _, weights in sample.steps)
    mass = answer_masses(checkpoint, own, "response").mass(Role.VISUAL).mean(dim=(0, 2))[0]
    mass = mass[query_mask(own.roles, "response")[0]]
    of_pieces = [float(m.mean()) for m in mass.split([len(piece) for piece in pieces])]
    assert [float(weights.sum()) for _, weights in sample.steps] == pytest.approx(of_pieces, rel=1e-4)


def test_sentences():
    tokens = [
        "<think>",
        "I",
        " see",
        " it",
        ".",
        " Again",
        ",",
        " red",
        ".",
        "</think>",
        "<answer>",
        "red",
        "</answer>",
        "<|im_end|>",
    ]
    expected = ["<think>I see it.", " Again,", " red.</think>", "<answer>red</answer><|im_end|>"]
    assert ["".join(s) for s in sentences(tokens)] == expected
    assert sentences([]) == []


def test_an_evaluation_has_every_figure(folder, rows):
    results = evaluate(folder, rows, lambda row, text: float(row["extra_info"]["task"] == "count"), max_new_tokens=6)
    assert results["accuracy"] == results["shuffled"]
    assert results["accuracy"] == {"all": 0.25, "colour": 0.0, "where": 0.0, "count": 1.0, "digit": 0.0}
    assert len(results["responses"]) == len(rows)
    for scope in ("user", "response"):
        assert set(results["vas"][scope]) == {"paper", "head_mean", "median"}
    assert 0 < results["mass"]["visual"] < 1 and results["dtype"] == "float32"


def test_the_control_answers_the_same_questions_with_the_shuffled_images(folder, rows, monkeypatch):
    seen = []

    def record(checkpoint, prompts, images, max_new_tokens):
        seen.append((prompts, images))
        return answer(checkpoint, prompts, images, max_new_tokens)

    monkeypatch.setattr("verl_avar.evaluation.evaluate.answer", record)
    evaluate(folder, rows, lambda row, text: 0.0, max_new_tokens=2, seed=4)
    (prompts, own), (same_prompts, others) = seen
    assert all(a is b for a, b in zip(own, rows["images"], strict=True))
    assert all(a is b for a, b in zip(others, shuffled_images(rows, 4), strict=True))
    assert [p[1]["content"] for p in prompts] == [p[1]["content"] for p in same_prompts]


def test_no_row_keeps_its_own_image_in_the_shuffled_control(rows):
    shuffled = shuffled_images(rows, seed=3)
    tasks = [info["task"] for info in rows["extra_info"]]
    own = {bytes(images[0]["bytes"]): task for images, task in zip(rows["images"], tasks, strict=True)}
    for images, before, task in zip(shuffled, rows["images"], tasks, strict=True):
        assert images[0]["bytes"] != before[0]["bytes"] and own[bytes(images[0]["bytes"])] == task
    with pytest.raises(ValueError, match="at least two rows"):
        shuffled_images(rows[:1], seed=0)


def test_a_prompt_without_its_image_is_an_error(checkpoint, rows):
    with pytest.raises(ValueError, match="row 0: 1 <image> in the prompt, 0 images"):
        prompt_inputs(checkpoint, [rows["prompt"].iloc[0]], [[]])
