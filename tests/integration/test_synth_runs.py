"""`avar synth run` as a user starts it, against the exact teacher's endpoint: faults, kills, budgets, keys, retries."""

import json
import os
import signal
from collections import Counter

import pyarrow.parquet as pq
import pytest
import yaml
from servers import free_port
from synthesis_runs import (
    FAULTS,
    HOLD_S,
    Started,
    compare,
    decided,
    misjudged,
    outcomes,
    rate,
    run,
    settings,
    stored,
    write_config,
)

from verl_avar import cli
from verl_avar.miniature.data import write_questions
from verl_avar.miniature.teacher_server import Teacher
from verl_avar.synthesis.command import EXIT_BAD_INPUT, EXIT_BUDGET, EXIT_FAILED, EXIT_STOPPED
from verl_avar.synthesis.prompt import copy_prompts

ROWS = 24
SECRET = "sk-secret-of-this-test-1234567"
CALLS_OF_A_ROW = 3


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("questions") / "questions.parquet", ROWS, seed=0)


@pytest.fixture(scope="module")
def exact():
    """A teacher without faults; several tests ask it, so its counts are looked at as differences."""
    with Teacher() as server:
        yield server


@pytest.fixture(scope="module")
def leaky():
    with Teacher({"leak": 0.4}) as server:
        yield server


@pytest.fixture
def synth(tmp_path, questions, capsys):
    """synth(server, *arguments, **settings) -> (exit status, stdout, stderr) of a run in this process, into OUT."""

    def start(server, *arguments, change=lambda given: None, **endpoint):
        given = settings(tmp_path / "out", questions, getattr(server, "url", server), **endpoint)
        change(given)
        config = write_config(tmp_path / "config.yaml", given)
        capsys.readouterr()
        code = cli.main(["synth", "run", str(config), *arguments])
        return code, *capsys.readouterr()

    return start


class Asked:
    """What a teacher was asked, and what it served, since this was made."""

    def __init__(self, server):
        self.server, self.before = server, server.stats()

    def since(self, what: str) -> Counter:
        return Counter(self.server.stats()[what]) - Counter(self.before[what])


def by_row(out, *columns):
    return {row["source_row"]: tuple(row[name] for name in columns) for row in outcomes(out)}


def test_every_row_is_accounted_for_once_and_the_same_after_kills(tmp_path):
    seen = compare(tmp_path, 240, per_minute=None, kills=2, seed=1)
    assert seen.failures == []
    assert seen.accepted + seen.rejected == 240 and seen.kills == 2
    assert {reason.split(": ")[1] for reason in seen.reasons} >= {"leak", "refusal", "wrong_answer"}


def test_the_stated_rate_is_used_through_faults_and_not_exceeded(synth, tmp_path):
    """Few requests a second, so that the endpoint is the limit on a busy machine too."""
    more = write_questions(tmp_path / "more.parquet", 100, seed=2)
    with Teacher(FAULTS, requests_per_minute=1500, hold_s=HOLD_S) as server:
        code, *_ = synth(server, f"sources=[{{path: {more}}}]", requests_per_minute=1500)
        stats = server.stats()
    own = json.loads((tmp_path / "out" / "summary.json").read_text())["endpoints"]["teacher"]
    assert code == 0 and misjudged(more, outcomes(tmp_path / "out")) == []
    assert 0.85 <= rate(stats) / 1500 <= 1.05 and "limited" not in stats["responses"]
    assert own["requests_per_minute"] == pytest.approx(rate(stats), rel=0.1)


def test_a_spent_budget_leaves_rows_pending_and_a_larger_one_finishes_without_a_call_twice(synth, tmp_path, exact):
    asked, out = Asked(exact), tmp_path / "out"
    code, _, errors = synth(exact, "budget.tokens=9000", concurrency=2)
    rows = outcomes(out)
    pending = sum(row["status"] == "pending" for row in rows)
    assert code == EXIT_BUDGET == 3 and len(rows) == ROWS and 0 < pending < ROWS
    assert errors.startswith(f"stopped: the budget is spent; {pending} rows are left; ") and errors.count("\n") == 1
    tokens = [call["prompt_tokens"] + call["completion_tokens"] for call in stored(out)]
    assert 9000 <= sum(tokens) < 9000 + 2 * max(tokens)
    assert asked.since("texts") == {"exact": len(tokens)}
    code, _, errors = synth(exact, "budget.tokens=9000", concurrency=2)
    assert code == EXIT_BUDGET and asked.since("texts") == {"exact": len(tokens)}
    code, _, errors = synth(exact, "budget.tokens=1000000", concurrency=2)
    assert (code, errors) == (0, "") and {row["status"] for row in outcomes(out)} == {"accepted"}
    assert asked.since("texts") == {"exact": CALLS_OF_A_ROW * ROWS}


def test_retry_asks_the_stage_that_rejected_again_and_nothing_else(synth, tmp_path, questions, leaky):
    out = tmp_path / "out"
    assert synth(leaky)[0] == 0
    before = by_row(out, "id", "status", "reason", "anchored")
    leaks = {one: values for one, values in before.items() if values[2] == "leak"}
    assert ROWS > len(leaks) > 2
    asked, old = Asked(leaky), {call["key"] for call in stored(out)}
    code, told, _ = synth(leaky, "--retry", "leak")
    assert code == 0 and f"leak: {len(leaks)} rows are asked again" in told
    assert asked.since("requests") == {"anchor": len(leaks)}
    new = [call for call in stored(out) if call["key"] not in old]
    assert sorted(call["row"] for call in new) == sorted(values[0] for values in leaks.values())
    assert {(call["stage"], call["attempt"]) for call in new} == {("anchor", 1)}
    after = by_row(out, "id", "status", "reason", "anchored")
    assert {one: after[one] for one in after if one not in leaks} == {
        one: before[one] for one in before if one not in leaks
    }
    assert any(after[one][1] == "accepted" for one in leaks)
    assert misjudged(questions, outcomes(out)) == []


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("lek", "unknown reason 'lek'"),
        ("ankor:leak", "unknown stage 'ankor'"),
        ("duplicate", "duplicate is a reason of the intake"),
    ],
)
def test_a_reason_that_no_call_can_change_is_refused_in_one_line(synth, tmp_path, exact, reason, words):
    asked = Asked(exact)
    code, _, errors = synth(exact, "--retry", reason)
    assert code == EXIT_BAD_INPUT and errors.startswith("error: ") and words in errors and errors.count("\n") == 1
    assert not asked.since("requests") and not (tmp_path / "out" / "calls").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda given: given["stages"]["reason"].update(modl="m"), "modl"),
        (lambda given: given["endpoints"]["teacher"].update(api_key=SECRET), "keys don't go into files"),
        (lambda given: given["endpoints"]["teacher"].update(api_key_env="AVAR_NO_SUCH_KEY"), "AVAR_NO_SUCH_KEY"),
        (lambda given: given["sources"][0].update(path="/nowhere/questions.parquet"), "/nowhere/questions.parquet"),
    ],
)
def test_a_mistake_in_the_settings_is_one_line_and_nothing_is_sent(synth, exact, change, words):
    asked = Asked(exact)
    code, _, errors = synth(exact, change=change)
    assert code == EXIT_BAD_INPUT and errors.startswith("error: ") and words in errors and errors.count("\n") == 1
    assert SECRET not in errors and not asked.since("requests")


def files_with(folder, secret: str) -> list:
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_a_wrong_key_ends_the_run_in_one_line_and_no_key_is_ever_written(synth, tmp_path, monkeypatch):
    monkeypatch.setenv("AVAR_TEST_KEY", SECRET)
    wrong = SECRET[::-1]
    with Teacher(api_key_env="AVAR_TEST_KEY") as server:
        monkeypatch.setenv("AVAR_TEST_KEY", wrong)
        code, told, errors = synth(server, api_key_env="AVAR_TEST_KEY")
        assert code == EXIT_FAILED == 1 and errors.count("\n") == 1 and "check AVAR_TEST_KEY" in errors
        assert wrong not in told + errors and files_with(tmp_path, wrong) == []
        assert {row["status"] for row in outcomes(tmp_path / "out")} == {"pending"}
        monkeypatch.setenv("AVAR_TEST_KEY", SECRET)
        code, told, errors = synth(server, api_key_env="AVAR_TEST_KEY", change=_every_output)
        assert (code, errors) == (0, "") and SECRET not in told and files_with(tmp_path, SECRET) == []
        assert {row["status"] for row in outcomes(tmp_path / "out")} == {"accepted"}
        assert (tmp_path / "out" / "sharegpt" / "data.json").exists() and (tmp_path / "out" / "rl.parquet").exists()


def _every_output(given):
    given["outputs"] = ["sft", "rl", "sharegpt", "dataset"]


def test_images_go_to_the_describer_alone_and_texts_to_the_endpoint_of_their_stage(synth, exact, leaky):
    eyes, words = Asked(exact), Asked(leaky)

    def change(given):
        given["endpoints"]["other"] = {**given["endpoints"]["teacher"], "base_url": leaky.url}
        for stage in ("reason", "anchor"):
            given["stages"][stage]["endpoint"] = "other"

    assert synth(exact, change=change)[0] == 0
    assert eyes.since("requests") == {"describe": ROWS} == {"describe": eyes.since("with_images")["scene-describer"]}
    assert words.since("requests") == {"reason": ROWS, "anchor": ROWS} and not words.since("with_images")


def test_proxies_and_keys_of_the_environment_are_not_used(synth, exact, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{free_port()}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    assert synth(exact)[0] == 0


def test_a_second_run_is_refused_while_one_runs_and_sigterm_loses_no_request(tmp_path, questions, synth):
    """Requests of 0.3 s, four at a time: some are in flight whenever the signal comes."""
    out = tmp_path / "out"
    with Teacher(latency_ms=300) as server:
        config = write_config(tmp_path / "slow.yaml", settings(out, questions, server.url, concurrency=4))
        with Started(config) as started:
            assert started.until(lambda: len(stored(out)) > 4)
            code, _, errors = synth(server, concurrency=4)
            assert code == EXIT_BAD_INPUT and errors.count("\n") == 1
            assert f"a run is writing here (pid {started.process.pid} on " in errors
            started.process.send_signal(signal.SIGTERM)
            ended = started.ended(60)
        calls, rows = stored(out), outcomes(out)
        pending = sum(row["status"] == "pending" for row in rows)
        assert ended.code == EXIT_STOPPED == 143, ended.errors
        assert ended.errors.endswith(f"\nstopped: asked to end; {pending} rows are left\n")
        assert ended.errors.strip().count("\n") == 1  # the first says that requests in flight are waited for
        assert pending > 0 and len(rows) == ROWS and 4 < len(calls) < CALLS_OF_A_ROW * ROWS
        assert server.stats()["texts"] == {"exact": len(calls)}  # of every request that was made the answer is kept
        code, *_ = synth(server, concurrency=16)
        assert code == 0 and server.stats()["texts"] == {"exact": CALLS_OF_A_ROW * ROWS}


def test_changed_thresholds_need_no_call_and_a_changed_prompt_only_those_of_its_stage(synth, tmp_path, leaky):
    out = tmp_path / "out"
    assert synth(leaky)[0] == 0
    first = by_row(out, "status", "reason")
    asked = Asked(leaky)
    assert synth(leaky, "checks.reason.min_words=100000")[0] == 0
    assert set(by_row(out, "status", "stage", "reason").values()) == {("rejected", "reason", "too_short")}
    assert synth(leaky)[0] == 0 and by_row(out, "status", "reason") == first
    assert not asked.since("requests")
    copy_prompts(tmp_path / "prompts")
    prompt = tmp_path / "prompts" / "anchor.jinja"
    prompt.write_text(prompt.read_text().replace("You edit reasoning.", "You edit reasoning with care."))
    assert synth(leaky, "stages.anchor.prompt=prompts/anchor.jinja")[0] == 0
    assert asked.since("requests") == {"anchor": ROWS}
    assert synth(leaky, "stages.anchor.prompt=null")[0] == 0 and by_row(out, "status", "reason") == first
    assert asked.since("requests") == {"anchor": ROWS}


def test_of_three_candidates_one_is_kept_by_the_rule(synth, tmp_path, leaky):
    """A leaky chain has one look of two; so chains that pass have the same looks, and `shortest` the same text."""
    out, asked = tmp_path / "out", Asked(leaky)

    def kept(rule):
        assert synth(leaky, "stages.anchor.candidates=3", f"stages.anchor.keep={rule}")[0] == 0
        assert all(row["status"] == "accepted" or row["reason"] == "leak" for row in outcomes(out))
        return outcomes(out)

    rows = kept("first")
    asked_first = asked.since("requests")["anchor"]
    anchors = [call for call in stored(out) if call["stage"] == "anchor"]
    assert len(anchors) == asked_first and ROWS < asked_first < 3 * ROWS  # no more than until one passes
    for row in rows:
        mine = sorted((call["candidate"], call["text"]) for call in anchors if call["row"] == row["id"])
        shown = [text for _, text in mine]
        failed = sum(candidate["stage"] == "anchor" for candidate in row["candidates"])
        if row["status"] == "accepted":
            assert row["anchored"] == shown[-1] and failed == len(mine) - 1
        else:
            assert len(mine) == 3 and row["anchored"] == shown[0] and failed == 2
    for rule in ("shortest", "most_anchors"):
        again = kept(rule)
        assert asked.since("requests") == {"describe": ROWS, "reason": ROWS, "anchor": 3 * ROWS}
        assert decided(again) == decided(rows)
        assert all(row["calls"] == CALLS_OF_A_ROW + 2 for row in again)


def test_an_endpoint_that_is_down_is_said_and_the_next_run_goes_on(synth, tmp_path, exact):
    code, told, errors = synth(f"http://127.0.0.1:{free_port()}/v1", attempts=2, backoff_s=0.01)
    assert code == EXIT_FAILED and errors.count("\n") == 1 and "The same command goes on from here" in errors
    assert "no request was answered; the last, of describe by endpoint teacher: connection" in errors
    rows = outcomes(tmp_path / "out")
    assert {(row["status"], row["stage"], row["reason"]) for row in rows} == {("rejected", "describe", "call_failed")}
    assert all("connection" in row["detail"] for row in rows) and "call_failed" in told
    assert len(stored(tmp_path / "out", "failures")) == ROWS and stored(tmp_path / "out") == []
    assert synth(exact)[0] == 0 and {row["status"] for row in outcomes(tmp_path / "out")} == {"accepted"}


def test_calls_that_failed_are_counted_and_made_again_by_the_next_run(synth, tmp_path, questions, exact):
    out = tmp_path / "out"
    with Teacher({"server_error": 0.5}) as server:
        code, *_ = synth(server, attempts=1)
    rows = outcomes(out)
    failed = {row["source_row"]: row["stage"] for row in rows if row["reason"] == "call_failed"}
    assert code == 0 and len(rows) == ROWS and 0 < len(failed) < ROWS
    assert len(stored(out, "failures")) == len(failed)
    summary = json.loads((out / "summary.json").read_text())
    assert sum(part.get("call_failed", 0) for part in summary["reasons"].values()) == len(failed)
    asked, before = Asked(exact), len(stored(out))
    assert synth(exact)[0] == 0 and misjudged(questions, outcomes(out)) == []
    assert {row["status"] for row in outcomes(out)} == {"accepted"}
    assert sum(asked.since("requests").values()) == CALLS_OF_A_ROW * ROWS - before
    assert asked.since("requests")["describe"] == sum(stage == "describe" for stage in failed.values())


def test_a_run_killed_while_it_writes_its_outputs_is_whole_after_the_next(tmp_path, questions, exact):
    out = tmp_path / "out"
    config = write_config(tmp_path / "config.yaml", settings(out, questions, exact.url))
    asked = Asked(exact)
    with Started(config) as started:
        assert started.until(lambda: (out / "outcomes.parquet").exists())
        os.kill(started.process.pid, signal.SIGKILL)
    assert run(config).code == 0 and asked.since("texts") == {"exact": CALLS_OF_A_ROW * ROWS}
    assert pq.read_metadata(out / "sft.parquet").num_rows == ROWS
    assert yaml.safe_load((out / "config.yaml").read_text())["name"] == "runs"
