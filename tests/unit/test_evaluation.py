"""Answers, masses and figures of a checkpoint, on the miniature with random weights."""

import functools
import json
import shutil

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from verl_avar.attention import reference
from verl_avar.attention.hf import set_attention
from verl_avar.attention.mass import MASS_ROLES
from verl_avar.evaluation.answer import answer, answer_masses, attention_only, end_tokens
from verl_avar.evaluation.benchmark.predict import RESULTS_FILE, write_questions
from verl_avar.evaluation.benchmark.schema import RESULTS
from verl_avar.evaluation.checkpoint import load_checkpoint, prompt_inputs, prompt_roles
from verl_avar.evaluation.evaluate import answered, look
from verl_avar.evaluation.heatmap import heatmap_sample, sentences
from verl_avar.miniature.data import write_eval
from verl_avar.miniature.model import build_model, build_processor, save
from verl_avar.miniature.tokenizer import build_tokenizer
from verl_avar.roles import Role, query_mask
from verl_avar.vas import EPS


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


@pytest.fixture(scope="module")
def run_folder(answers, rows, tmp_path_factory):
    """A model's folder of a run with the answers of `answers`: one was cut off, one is empty, one did not come."""
    folder = tmp_path_factory.mktemp("run")
    question = {"benchmark": "held_out", "choices": [], "answer_type": "text", "meta": "{}"}
    said = [*answers.texts[:2], "", None]
    questions, results = [], []
    for n, (prompt, images, text) in enumerate(zip(rows["prompt"], rows["images"], said, strict=False)):
        pictures = [{"bytes": image["bytes"]} for image in images]
        questions.append(question | {"id": str(n), "question": "", "answer": "3", "images": pictures})
        asked = {"benchmark": "held_out", "id": str(n), "repeat": 0, "answer": "3", "prompt": json.dumps(list(prompt))}
        given = {"response": text, "finish": None if text is None else "length" if n == 1 else "stop"}
        results += [asked | given | {"condition": "plain"}, asked | given | {"condition": "other_image"}]
    write_questions(questions, folder)
    pq.write_table(pa.Table.from_pylist(results, schema=RESULTS), folder / RESULTS_FILE)
    return folder


def by_hand(checkpoint, prompt, images, ids, scope):
    """[(visual, system)] by layer, head and query of a prompt with a response in token ids, from whole eager maps."""
    inputs = dict(prompt_inputs(checkpoint, [prompt], [images]))
    own = prompt_roles(checkpoint, [prompt], inputs)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids], dtype=torch.long)], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(ids)))
    roles = torch.nn.functional.pad(own, (0, len(ids)), value=int(Role.RESPONSE))
    set_attention(checkpoint.model, "avar_eager")
    with torch.no_grad():
        maps = torch.stack(checkpoint.model(**inputs, output_attentions=True).attentions)[:, 0]  # [L, H, T, T]
    set_attention(checkpoint.model, "avar_sdpa")
    asked = maps[:, :, query_mask(roles, scope)[0]]
    return asked[..., roles[0] == Role.VISUAL].sum(-1), asked[..., roles[0] == Role.SYSTEM].sum(-1)


def test_attention_is_measured_in_the_answers_that_were_stored(checkpoint, folder, rows, run_folder):
    found = look(run_folder, folder, batch_size=3)
    ends, texts = end_tokens(checkpoint), [row.response for row in answered(run_folder)]
    ids = [checkpoint.tokenizer.encode(text, add_special_tokens=False) for text in texts[:2]]
    ids = [ids[0] + ends[:1], ids[1], []]  # the second was cut off: it wrote no end marker; the third wrote nothing
    for scope in ("user", "response"):
        masses = [by_hand(checkpoint, rows["prompt"][n], rows["images"][n], ids[n], scope) for n in range(3)]
        visual, system = (torch.cat(one, dim=-1).double() for one in zip(*masses, strict=True))
        heads_averaged = visual.mean(1) / (system.mean(1) + EPS)
        expected = {
            "paper": float((visual / (system + EPS)).mean()),
            "head_mean": float(heads_averaged.mean()),
            "median": float(heads_averaged.mean(0).median()),
        }
        assert found["vas"][scope] == pytest.approx(expected, rel=1e-3)
    assert found["mass"] == pytest.approx({"visual": float(visual.mean()), "system": float(system.mean())}, rel=1e-4)
    assert found["measured"] == 3 and found["dtype"] == "float32"
    assert found["unmeasured"] == [{"row": "3", "reason": "no answer came"}]


def test_a_second_look_loads_no_model_unless_answers_or_the_model_changed(folder, run_folder, tmp_path, monkeypatch):
    first = look(run_folder, folder, batch_size=3)
    loaded = []
    monkeypatch.setattr("verl_avar.evaluation.evaluate.load_checkpoint", lambda path, **_: loaded.append(path) or 1 / 0)
    assert look(run_folder, folder, batch_size=1) == first and loaded == []
    other = shutil.copytree(folder, tmp_path / "other")
    with pytest.raises(ZeroDivisionError):
        look(run_folder, other)
    copy = shutil.copytree(run_folder, tmp_path / "run")
    table = pq.read_table(copy / RESULTS_FILE).to_pylist()
    changed = [row | {"response": row["response"] and row["response"] + "!"} for row in table]
    pq.write_table(pa.Table.from_pylist(changed, schema=RESULTS), copy / RESULTS_FILE)
    with pytest.raises(ZeroDivisionError):
        look(copy, folder)


def test_a_prompt_without_its_image_is_an_error(checkpoint, rows):
    with pytest.raises(ValueError, match="row 0: 1 <image> in the prompt, 0 images"):
        prompt_inputs(checkpoint, [rows["prompt"].iloc[0]], [[]])
