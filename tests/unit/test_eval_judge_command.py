"""`avar eval --judge`: verdicts count, rubbish is counted and the rules decide, and nothing is asked twice."""

import json

import pandas as pd
import pytest
from benchmark_copies import write_copies
from http_endpoint import HttpEndpoint, completion, refusal

from verl_avar.cli import main

# Words of a question -> what the judge says of its answer; to all others it says that they are right.
SAYS = {
    "What colour is the disc?": '{"right": false}',  # MathVista 1, MMStar 0
    "How many discs are there?": "Certainly! The answer is right.",  # MathVista 2
    "How wide is the disc?": '{"right": "true"}',  # MathVista 3
    "Which figure comes next?": (400, refusal("too long")),  # MMStar 1
}
UNREADABLE, FAILED = {("mathvista", "2"), ("mathvista", "3")}, {("mmstar", "1")}
AGAINST = {("mathvista", "1"), ("mmstar", "0")}


@pytest.fixture
def judge():
    """An endpoint that says what `.says` has, and remembers in `.bodies`."""

    def reply(body, before):
        user = body["messages"][-1]["content"]
        said = next((said for words, said in http.says.items() if words in user), '{"right": true}')
        return said if isinstance(said, tuple) else completion(said, model="judge-2026")

    with HttpEndpoint(reply) as http:
        http.says = SAYS
        yield http


@pytest.fixture
def evaluate(tmp_path, judge):
    """evaluate(*words) -> (exit status, results by benchmark and id, summary.json) on MathVista and MMStar, of a model
    that answers A to everything."""
    write_copies(tmp_path / "data", "tsv")
    answer = "<think>It is not B.</think><answer>A</answer>"
    with HttpEndpoint(lambda body, before: completion(answer)) as model:

        def run(*words):
            arguments = ["--model", "org/model", "--suite", "mathvista,mmstar", "--server", model.url]
            arguments += ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), *words]
            status, folder = main(["eval", *arguments]), tmp_path / "out" / "model"
            if not (folder / "summary.json").exists():
                return status, None, None
            results = pd.read_parquet(folder / "results.parquet").set_index(["benchmark", "id"])
            results = results.astype(object).where(results.notna(), None)
            return status, results, json.loads((folder / "summary.json").read_text())

        run.model = model
        yield run


def named(judge):
    return "--judge", judge.url, "--judge-model", "judge"


def test_a_verdict_counts_and_rubbish_leaves_the_rules_and_is_counted(evaluate, judge, capsys):
    status, rules, summary = evaluate()
    assert status == 0 and set(rules["scored_by"]) == {"rules"} and "judge" not in summary and not judge.bodies
    status, judged, summary = evaluate(*named(judge))
    assert status == 0 and len(judge.bodies) == len(judged) == 6
    for key, row in judged.iterrows():
        problem = "judge_unreadable" if key in UNREADABLE else "judge_failed" if key in FAILED else None
        believed = key not in UNREADABLE | FAILED
        assert row["scored_by"] == ("judge" if believed else "rules")
        assert row["right"] == (key not in AGAINST if believed else rules.loc[key, "right"])
        assert row["problem"] == (problem or rules.loc[key, "problem"])
    counts = {"asked": 6, "stored": 0, "judged": 3, "unreadable": 2, "failed": 1}
    # Of the judged, the rules have both "A" right that the judge has wrong, and MathVista 4, "A" for a list, wrong.
    counts |= {"agree": 0, "only_rules": 2, "only_judge": 1, "models": ["judge-2026"], "name": "judge"}
    assert summary["judge"] == counts
    assert "judge" in summary["scored_by"] and "rules" in summary["scored_by"]
    said = " ".join(capsys.readouterr().out.split())
    assert "3 answers judged by judge" in said and "2 verdicts that can't be read" in said


def test_a_judge_of_rubbish_alone_changes_no_score(evaluate, judge, tmp_path):
    _, rules, _ = evaluate()
    table = (tmp_path / "out" / "report" / "table.csv").read_text()
    judge.says = {"": "right right right"}
    status, judged, summary = evaluate(*named(judge))
    assert status == 0 and judged["right"].tolist() == rules["right"].tolist()
    assert set(judged["scored_by"]) == {"rules"} and set(judged["problem"]) == {"judge_unreadable"}
    assert (summary["judge"]["judged"], summary["judge"]["unreadable"]) == (0, 6)
    assert (tmp_path / "out" / "report" / "table.csv").read_text() == table


def test_a_rerun_asks_the_judge_only_what_failed_and_the_model_nothing(evaluate, judge, tmp_path):
    _, first, _ = evaluate(*named(judge))
    tables = [(tmp_path / "out" / "report" / f"table.{kind}").read_bytes() for kind in ("md", "csv", "tex")]
    _, again, summary = evaluate(*named(judge))
    assert len(judge.bodies) == 7 and (summary["judge"]["asked"], summary["judge"]["stored"]) == (1, 5)
    pd.testing.assert_frame_equal(first, again)
    assert [(tmp_path / "out" / "report" / f"table.{kind}").read_bytes() for kind in ("md", "csv", "tex")] == tables
    judge.says = {}
    _, mended, summary = evaluate(*named(judge))
    assert len(judge.bodies) == 8 and len(evaluate.model.bodies) == 6 and summary["judge"]["failed"] == 0
    (changed,) = [key for key in first.index if not mended.loc[key].equals(first.loc[key])]
    assert {changed} == FAILED and mended.loc[changed, "right"] and mended.loc[changed, "scored_by"] == "judge"


def test_a_judge_that_refuses_access_ends_the_command_with_the_answers_kept(evaluate, judge, capsys):
    judge.says = {"": (401, refusal("who are you?"))}
    status, results, _ = evaluate(*named(judge))
    assert status == 1 and results is None and "refuses access" in capsys.readouterr().err
    judge.says = SAYS
    status, results, _ = evaluate(*named(judge))
    assert status == 0 and len(results) == len(evaluate.model.bodies) == 6


def test_the_judges_key_goes_to_the_judge_alone(evaluate, judge, monkeypatch):
    monkeypatch.setenv("AVAR_TEST_JUDGE_KEY", "sk-judge")
    status, _, _ = evaluate(*named(judge), "--judge-key-env", "AVAR_TEST_JUDGE_KEY")
    assert status == 0
    assert {request["headers"]["authorization"] for request in judge.seen} == {"Bearer sk-judge"}
    assert not any("authorization" in request["headers"] for request in evaluate.model.seen)


@pytest.mark.parametrize("half", [["--judge", "http://127.0.0.1:9/v1"], ["--judge-model", "judge"]])
def test_half_a_judge_is_a_mistake_before_anything_is_asked(evaluate, half, capsys):
    status, results, _ = evaluate(*half)
    assert status == 2 and results is None and not evaluate.model.bodies
    assert "--judge http://HOST:PORT/v1 and --judge-model NAME" in capsys.readouterr().err
