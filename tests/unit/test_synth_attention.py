"""Attention-aware selection: the numbers are those of `avar vas`, and what was measured stays measured."""

import io
import json
import random

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf

from verl_avar import families
from verl_avar.data.schema import ROWS, content_id
from verl_avar.errors import ConfigError
from verl_avar.evaluation.checkpoint import load_checkpoint
from verl_avar.evaluation.rows import read_rows
from verl_avar.evaluation.vas_run import Settings, measure_rows
from verl_avar.miniature import base_path
from verl_avar.miniature.tasks import SYSTEM, TASKS, draw_sample
from verl_avar.synthesis import student
from verl_avar.synthesis.attention import apply
from verl_avar.synthesis.config import Attention
from verl_avar.synthesis.outcomes import OUTCOMES
from verl_avar.synthesis.student import Chain, folder, score, stored


@pytest.fixture(scope="module")
def samples():
    rng = random.Random(0)
    return [draw_sample(task, "train", rng) for task in (*TASKS, *TASKS[:2])]


def png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def chains(samples):
    return [Chain(SYSTEM, f"<image>{s.question}", [png(s.image)], s.response) for s in samples]


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint(base_path())


@pytest.fixture
def counted(monkeypatch, checkpoint):
    """The student, loaded once, and the texts that it was shown."""
    shown, measure = [], student._measure

    def note(student, batch):
        shown.extend(chain.text for chain in batch)
        return measure(student, batch)

    monkeypatch.setattr(student, "_load", lambda model, device: checkpoint)
    monkeypatch.setattr(student, "_measure", note)
    return shown


def test_share_and_masses_are_those_of_avar_vas_and_of_the_reward(tmp_path, chains, checkpoint, counted):
    known = score(base_path(), chains, tmp_path, batch_size=3)
    records = [
        {"messages": chain.messages, "images": [{"bytes": i} for i in chain.images], "response": chain.text}
        for chain in chains
    ]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "rows.parquet")
    rows = read_rows(tmp_path / "rows.parquet")
    assert not measure_rows(checkpoint, rows, Settings(scope="response"), tmp_path / "vas").failed
    theirs = pd.concat([pd.read_parquet(part) for part in sorted((tmp_path / "vas").iterdir())]).set_index("number")
    ours = pd.concat([pd.read_parquet(part) for part in folder(tmp_path, base_path()).iterdir()]).set_index("key")
    assert len(theirs) == len(ours) == len(chains)
    for number, chain in enumerate(chains):
        there, here = theirs.loc[number], ours.loc[chain.key]
        assert here["ratio"] == pytest.approx(np.mean(there["head_mean"]), rel=1e-4)
        assert here["visual"] == pytest.approx(np.mean(there["visual"]), rel=1e-4)
        assert here["system"] == pytest.approx(np.mean(there["system"]), rel=1e-4)
        assert here["tokens"] == there["response_tokens"]
        assert known.shares[chain.key] == here["share"] == pytest.approx(naive_share(checkpoint, chain), rel=1e-4)


def naive_share(checkpoint, chain) -> float:
    """Eager attention of one sequence, layer by layer, at the positions that predict each token of the response."""
    from verl_avar.evaluation.answer import given
    from verl_avar.evaluation.images import open_images
    from verl_avar.roles import Role

    answers = given(checkpoint, [chain.messages], [open_images(chain.images)], [chain.text])
    eager = load_checkpoint(base_path(), implementation="avar_eager")
    with torch.no_grad():
        layers = eager.model(**answers.inputs, output_attentions=True).attentions  # [1, H, T, T] each
    roles, values = answers.roles[0], []
    for layer in layers:
        heads_averaged = layer[0].mean(0)
        for token in (roles == Role.RESPONSE).nonzero().flatten() - 1:
            v = float(heads_averaged[token, roles == Role.VISUAL].sum())
            s = float(heads_averaged[token, roles == Role.SYSTEM].sum())
            values.append(v / (v + s))
    return float(np.mean(values))


def test_a_rerun_measures_only_what_is_missing_and_passes_over_half_a_file(tmp_path, chains, counted):
    first = score(base_path(), chains[:3], tmp_path, batch_size=2)
    assert sorted(counted) == sorted(c.text for c in chains[:3])
    parts = folder(tmp_path, base_path())
    whole = next(parts.glob("part-*")).read_bytes()
    (parts / "unfinished-1").write_bytes(whole[: len(whole) // 2])
    counted.clear()
    told = []
    both = score(base_path(), chains[:4], tmp_path, batch_size=2, progress=told.append)
    assert counted == [chains[3].text] and sum(told) == 4
    assert {key: both.shares[key] for key in first.shares} == first.shares
    assert stored(parts)[0].shares == both.shares


def test_a_killed_run_loses_at_most_the_batch_in_flight(tmp_path, chains, counted, monkeypatch):
    measure = student._measure

    def killed(student, batch):
        if len(counted) == 4:
            raise KeyboardInterrupt
        return measure(student, batch)

    with monkeypatch.context() as patch:
        patch.setattr(student, "_measure", killed)
        with pytest.raises(KeyboardInterrupt):
            score(base_path(), chains, tmp_path, batch_size=2)
    assert len(stored(folder(tmp_path, base_path()))[1]) == 4
    counted.clear()
    rest = score(base_path(), iter(chains), tmp_path, batch_size=2)
    assert len(counted) == 2 and len(rest.shares) == 6


def test_a_chain_that_cannot_be_measured_is_recorded_with_its_reason(tmp_path, chains, counted):
    chain = chains[0]
    long = Chain(chain.system, chain.question, chain.images, chain.text * 200)
    broken = Chain(chain.system, chain.question, [b"no picture"], chain.text)
    bare = Chain(chain.system, chain.question.removeprefix("<image>"), [], chain.text)
    marked = Chain(chain.system, chain.question, chain.images, "<|image_pad|>")
    known = score(base_path(), [chain, long, broken, bare, marked], tmp_path, batch_size=5)
    assert set(known.shares) == {chain.key}
    assert "more than the model's context" in known.problems[long.key]
    assert "cannot identify image" in known.problems[broken.key]
    assert known.problems[bare.key] == "no image" and "placeholder" in known.problems[marked.key]
    counted.clear()
    assert score(base_path(), [long, broken, bare, marked], tmp_path).problems == known.problems
    assert counted == []


def test_a_failure_of_the_machine_is_tried_again(tmp_path, chains, counted, monkeypatch):
    def fails(student, batch):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(student, "_measure", fails)
        assert "out of memory" in score(base_path(), chains[:1], tmp_path).problems[chains[0].key]
    known = score(base_path(), chains[:1], tmp_path)
    assert not known.problems and chains[0].key in known.shares


def test_keys_tell_prompts_images_and_texts_apart(chains):
    a = chains[0]
    others = [
        Chain("x", a.question, a.images, a.text),
        Chain(a.system, a.question + "x", a.images, a.text),
        Chain(a.system, a.question, chains[1].images, a.text),
        Chain(a.system, a.question, [*a.images, *a.images], a.text),
        Chain(a.system, a.question, a.images, a.text + "x"),
    ]
    assert len({a.key, *(other.key for other in others)}) == 6


def test_another_student_has_measurements_of_its_own(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"a")
    before = folder(tmp_path, model)
    assert folder(tmp_path, model) == before != folder(tmp_path, model, device="cuda")
    (model / "model.safetensors").write_bytes(b"ab")
    assert folder(tmp_path, model) != before


def test_a_student_that_is_none_is_one_clear_line(tmp_path, chains):
    with pytest.raises(ConfigError, match=r"attention\.model \(on cpu\): .*no such folder"):
        score(tmp_path / "nowhere", chains, tmp_path)


@pytest.fixture
def run(tmp_path, samples, chains):
    """A run's folder: six rows, of which the second was rejected before, and one that intake rejected."""
    rows, outcomes = [], []
    for number, (sample, chain) in enumerate(zip(samples, chains, strict=True)):
        row_id = content_id(chain.question, sample.answer, [], chain.images)
        key = {"id": row_id, "source": "scenes", "source_row": number}
        images = [{"bytes": image} for image in chain.images]
        meta = json.dumps({"task": sample.task})
        rows.append(key | {"question": chain.question, "answer": sample.answer, "choices": [], "images": images})
        rows[-1]["meta"] = meta
        accepted = number != 1
        outcomes.append(
            dict.fromkeys(OUTCOMES.names)
            | key
            | {
                "status": "accepted" if accepted else "rejected",
                "stage": None if accepted else "anchor",
                "reason": None if accepted else "leak",
                "anchored": chain.text,
                "anchors": [{"text": "Looking at the image again", "position": 0.5}],
                "weight": 1.0,
            }
        )
    early = dict.fromkeys(OUTCOMES.names) | {"id": "0", "source": "scenes", "source_row": 99, "status": "rejected"}
    outcomes.insert(2, early | {"stage": "intake", "reason": "duplicate"})
    pq.write_table(pa.Table.from_pylist(rows, ROWS), tmp_path / "rows.parquet", row_group_size=2)
    pq.write_table(pa.Table.from_pylist(outcomes, OUTCOMES), tmp_path / "outcomes.parquet")
    return tmp_path


def settings(**attention):
    given = Attention(model=str(base_path()), batch_size=3, **attention)
    return OmegaConf.create({"attention": OmegaConf.structured(given), "system": SYSTEM, "seed": 0})


def test_outcomes_keep_the_most_attentive_rows_and_account_for_all(run, chains, counted):
    before = pq.read_table(run / "outcomes.parquet")
    found = apply(settings(keep=0.6, weight=True), run)
    after = pq.read_table(run / "outcomes.parquet")
    assert after.schema == before.schema and after.num_rows == 7
    table = after.to_pandas()
    shares = {c.text: score(base_path(), [c], run).shares[c.key] for c in chains if c is not chains[1]}
    best = sorted(shares.values(), reverse=True)[:3]  # 0.6 of the five accepted rows
    entered = table[table["attention"].notna()]
    assert dict(zip(entered["anchored"], entered["attention"], strict=True)) == shares
    kept = table[table["status"] == "accepted"]
    assert sorted(kept["attention"], reverse=True) == best and kept["reason"].isna().all()
    assert kept["weight"].to_numpy() == pytest.approx(kept["attention"].to_numpy() / np.mean(best))
    dropped = table[table["stage"] == "attention"]
    assert len(dropped) == 2 and set(dropped["reason"]) == {"attention_low"} and (dropped["weight"] == 0).all()
    assert dropped["detail"].str.contains(f"{min(best):.4f}").all()
    assert table["reason"][[1, 2]].tolist() == ["leak", "duplicate"]
    assert (found["rows"], found["kept"], found["dropped"]) == (5, 3, 2)
    assert {group["name"] for group in found["by_task"]} == {"colour", "count", "digit", "where"}
    assert (run / "figures" / "attention.png").stat().st_size > 0
    assert (run / found["measurements"]).is_dir() and json.dumps(found)
    unlike = ["status", "stage", "reason", "detail", "attention", "weight"]
    assert after.drop_columns(unlike) == before.drop_columns(unlike)


def test_selection_is_made_anew_by_another_config_and_is_the_same_twice(run, counted):
    apply(settings(keep=0.4), run)
    once = pq.read_table(run / "outcomes.parquet")
    counted.clear()
    apply(settings(keep=0.4), run)
    assert pq.read_table(run / "outcomes.parquet") == once and counted == []
    apply(settings(keep=1.0), run)
    table = pq.read_table(run / "outcomes.parquet").to_pandas()
    assert (table["status"] == "accepted").sum() == 5 and (table["weight"].dropna() == 1).all()


def test_a_row_that_cannot_be_measured_stays_and_is_named(run, chains, counted):
    table = pq.read_table(run / "outcomes.parquet").to_pylist()
    table[0]["anchored"] *= 200
    pq.write_table(pa.Table.from_pylist(table, OUTCOMES), run / "outcomes.parquet")
    found = apply(settings(keep=0.5, weight=True), run)
    after = pq.read_table(run / "outcomes.parquet").to_pylist()
    assert after[0]["status"] == "accepted" and after[0]["attention"] is None and after[0]["weight"] == 1
    assert (found["measured"], found["not_measured"], found["kept"]) == (4, 1, 3)
    assert [p["id"] for p in found["problems"]] == [after[0]["id"]] and "context" in found["problems"][0]["reason"]


def test_without_a_student_nothing_happens_and_without_a_measurement_the_run_ends(run, counted, monkeypatch):
    before = (run / "outcomes.parquet").read_bytes()
    none = settings()
    none.attention.model = None
    assert apply(none, run) == {}
    monkeypatch.setattr(families, "reach", lambda model, roles, layers: torch.zeros(len(layers), *roles.shape).bool())
    with pytest.raises(ConfigError, match=r"none of 5 chains could be measured; the first: no system turn"):
        apply(settings(), run)
    assert (run / "outcomes.parquet").read_bytes() == before
