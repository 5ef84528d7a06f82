"""What became of rows, from stored answers alone, and the summary of it: hand-written stores, no endpoint."""

import asyncio
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from verl_avar.calls.store import CALLS, FAILURES, Writer
from verl_avar.data.schema import ROWS
from verl_avar.errors import ConfigError
from verl_avar.synthesis.checks.reasons import REASONS, STAGE_REASONS
from verl_avar.synthesis.config import Synthesis
from verl_avar.synthesis.intake import REJECTS
from verl_avar.synthesis.outcomes import OUTCOMES
from verl_avar.synthesis.pipeline import read_attempts
from verl_avar.synthesis.settle import check_reasons, send_again, settle
from verl_avar.synthesis.tally import summarise
from verl_avar.synthesis.walk import Unanswered, walk

DESCRIPTION = "A red circle at the left and a blue square at the right."
CHAIN = "<think>The description says the circle is red. It says so again.</think><answer>red</answer>"
ANCHORED = "<think>I see that the circle is red. Looking at the circle again, it is red.</think><answer>red</answer>"
WRONG = CHAIN.replace("<answer>red", "<answer>blue")
TEXTS = {"describe": DESCRIPTION, "reason": CHAIN, "anchor": ANCHORED}


def row(source, number):
    question = f"<image>What colour is the circle of picture {number}?"
    return {
        "id": f"{source}{number}", "source": source, "source_row": number, "question": question, "answer": "red",
        "choices": [], "images": [{"bytes": b"i"}], "meta": "{}",
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """(settings, folder) of two sources: one of rows 0 to 4 of which intake refused 1 and 3, one of row 0."""
    kept = [row("b", 0), row("b", 2), row("b", 4), row("a", 0)]
    refused = [
        {"id": None, "source": "b", "source_row": 1, "reason": "bad_row", "detail": "no answer"},
        {"id": "b3", "source": "b", "source_row": 3, "reason": "duplicate", "detail": "of row 0 of b"},
    ]
    pq.write_table(pa.Table.from_pylist(kept, schema=ROWS), tmp_path / "rows.parquet", row_group_size=2)
    pq.write_table(pa.Table.from_pylist(refused, schema=REJECTS), tmp_path / "intake.parquet")
    (tmp_path / "intake.json").write_text(json.dumps({"sources": {"b": {}, "a": {}}}))
    short = {"min_words": 3, "max_repeated": 1.0}
    given = {
        "name": "n", "out": str(tmp_path), "sources": [{"path": "b"}, {"path": "a"}],
        "endpoints": {"e": {"base_url": "http://e/v1", "requests_per_minute": 90}},
        "stages": {name: {"endpoint": "e", "model": f"m-{name}"} for name in TEXTS},
        "checks": {"describe": short, "reason": short, "anchor": short | {"min_spread": 0.0}},
    }  # fmt: skip
    config = OmegaConf.merge(OmegaConf.structured(Synthesis), given)
    return config, tmp_path


def store(folder, answers, writer="w", failed=()):
    """Stores answers of rows: id -> stage -> text, each under the key that the row's walk asks for."""
    config, out = folder
    calls, failures, attempts = Writer(out / CALLS, writer), Writer(out / FAILURES, writer), read_attempts(out)

    async def check(*_):
        return None

    for one in pq.read_table(out / "rows.parquet").to_pylist():
        given = answers.get(one["id"], {})

        async def ask(asked, given=given):
            about = {"row": asked.key, "stage": asked.stage}
            if asked.stage in failed and asked.stage not in given:
                failures.add(asked.key, about | {"kind": "timeout", "detail": "timeout (8 attempts)"})
            if asked.stage not in given:
                raise Unanswered("pending")
            record = about | {"text": given[asked.stage], "finish": "stop", "seconds": 0.5, "cost": 0.25}
            record |= {"prompt_tokens": 100, "completion_tokens": 10}
            calls.add(asked.key, record)
            return record

        asyncio.run(walk(one, config, attempts, ask, check))
    calls.close()
    failures.close()


def settled(folder):
    rows = pq.read_table(settle(*folder)).to_pylist()
    return {(one["source"], one["source_row"]): one for one in rows}, [
        (one["source"], one["source_row"]) for one in rows
    ]


ANSWERS = {
    "b0": TEXTS,
    "b2": {"describe": DESCRIPTION, "reason": WRONG},
    "b4": {"describe": DESCRIPTION},
    "a0": {},
}
STATES = {
    ("b", 0): ("accepted", None, None),
    ("b", 1): ("rejected", "intake", "bad_row"),
    ("b", 2): ("rejected", "reason", "wrong_answer"),
    ("b", 3): ("rejected", "intake", "duplicate"),
    ("b", 4): ("pending", "reason", None),
    ("a", 0): ("pending", "describe", None),
}


def states(found):
    return {key: (one["status"], one["stage"], one["reason"]) for key, one in found.items()}


def test_every_row_of_the_sources_stands_once_in_their_order(folder):
    store(folder, ANSWERS)
    found, order = settled(folder)
    assert order == list(STATES) and states(found) == STATES
    assert found["b", 0]["anchored"] == ANCHORED and len(found["b", 0]["anchors"]) == 2
    assert found["b", 0]["calls"] == 3 and found["b", 0]["cost"] == 0.75 and found["b", 0]["prompt_tokens"] == 300
    assert found["b", 2]["chain"] == WRONG and found["b", 2]["anchored"] is None and found["b", 2]["anchors"] == []
    assert found["b", 1]["id"] is None and found["b", 1]["calls"] == 0
    assert pq.read_schema(folder[1] / "outcomes.parquet").equals(OUTCOMES)
    assert not list(folder[1].glob(".outcomes*"))


def test_a_call_that_failed_is_a_reason_until_it_is_answered(folder):
    store(folder, ANSWERS, failed=("describe",))
    found, _ = settled(folder)
    assert states(found) == STATES | {("a", 0): ("rejected", "describe", "call_failed")}
    assert found["a", 0]["detail"] == "timeout (8 attempts)"
    store(folder, {"a0": TEXTS}, "x")
    assert states(settled(folder)[0])["a", 0] == ("accepted", None, None)


def test_other_checks_say_something_else_of_the_same_answers(folder):
    store(folder, ANSWERS)
    folder[0].checks.anchor.min_anchors = 5
    assert states(settled(folder)[0]) == STATES | {("b", 0): ("rejected", "anchor", "few_anchors")}


def test_a_retry_hides_the_answer_of_its_stage_alone_and_is_marked_once(folder):
    store(folder, ANSWERS)
    assert send_again(*folder, ["leak", "reason:wrong_answer", "describe:wrong_answer"]) == {
        "leak": 0, "reason:wrong_answer": 1, "describe:wrong_answer": 0,
    }  # fmt: skip
    waiting = STATES | {("b", 2): ("pending", "reason", None)}
    found, _ = settled(folder)
    assert states(found) == waiting and found["b", 2]["description"] == DESCRIPTION
    assert send_again(*folder, ["wrong_answer"]) == {"wrong_answer": 0}
    assert len((folder[1] / "retries.jsonl").read_text().splitlines()) == 1
    store(folder, {"b2": TEXTS}, "x")
    assert states(settled(folder)[0]) == STATES | {("b", 2): ("accepted", None, None)}


def test_failed_calls_need_no_mark_to_be_made_again(folder):
    store(folder, ANSWERS, failed=("describe",))
    assert send_again(*folder, ["call_failed"]) == {"call_failed": 1}
    assert (folder[1] / "retries.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("leaks", "unknown reason 'leaks'; known are call_failed, .*, leak,"),
        ("anchor:", "unknown reason ''"),
        ("think:leak", "unknown stage 'think'; stages are describe, reason, anchor"),
        ("near_duplicate", "near_duplicate is a reason of the intake, which asks no model"),
        ("intake:duplicate", "duplicate is a reason of the intake"),
        ("attention_low", "attention_low is the selection's, .* change attention.keep"),
    ],
)
def test_a_reason_that_no_call_can_change_is_refused(reason, words):
    with pytest.raises(ConfigError, match=words):
        check_reasons(["leak", reason])


def test_every_reason_of_a_stage_can_be_retried():
    assert set(STAGE_REASONS) < set(REASONS)
    check_reasons(STAGE_REASONS)
    check_reasons(["anchor:leak", "describe:refusal", "call_failed"])


def test_the_summary_counts_rows_calls_and_the_rate(folder):
    store(folder, ANSWERS)
    settle(*folder)
    (folder[1] / "runs").mkdir()
    first = {"describe": {"requests": 5, "answers": 3, "timeout": 2}, "reason": {"requests": 2, "answers": 2}}
    second = {"describe": {"requests": 1, "timeout": 1}, "anchor": {"requests": 1, "answers": 1}}
    for name, stages, seconds in (("1", first, 4.0), ("2", second, 2.0)):
        record = {"started": 0, "seconds": seconds + 1, "endpoints": {"e": {"stages": stages, "seconds": seconds}}}
        (folder[1] / "runs" / f"{name}.json").write_text(json.dumps(record))
    summary = summarise(*folder, None)
    assert [summary[name] for name in ("rows", "accepted", "rejected", "pending")] == [6, 1, 3, 2]
    assert summary["reasons"] == {"intake": {"bad_row": 1, "duplicate": 1}, "reason": {"wrong_answer": 1}}
    assert summary["sources"] == {"b": {"rows": 5, "accepted": 1}, "a": {"rows": 1, "accepted": 0}}
    describe, reason, anchor = (summary["stages"][stage] for stage in TEXTS)
    assert (describe["calls"], reason["calls"], anchor["calls"]) == (3, 2, 1)
    assert (describe["requests"], describe["retries"]) == (6, {"timeout": 3})
    assert (reason["prompt_tokens"], reason["completion_tokens"], reason["cost"]) == (200, 20, 0.5)
    assert summary["endpoints"]["e"] == {
        "base_url": "http://e/v1", "requests": 9, "requests_per_minute": 90.0, "stated_requests_per_minute": 90.0,
    }  # fmt: skip
    assert summary["seconds"] == 8.0 and summary["attention"] is None
