"""`avar eval --harness` on a small endpoint, with a stand-in for lmms-eval's environment; what it refuses."""

import json
import sys

import harness_standin
import pandas as pd
import pytest
from benchmark_copies import write_copies
from http_endpoint import HttpEndpoint, completion

from verl_avar.cli import main
from verl_avar.data.schema import SYSTEM
from verl_avar.errors import ConfigError
from verl_avar.evaluation.benchmark.definition import load_definition
from verl_avar.evaluation.benchmark.harness.suite import chosen, indexed, tables
from verl_avar.evaluation.benchmark.run import Plan, questions

SCORES = {"ratio": 0.5, "share": 0.3, "visual_mass": 0.2, "system_mass": 0.4, "vas": 0.6, "n": 3}


@pytest.fixture
def server():
    answer = completion("<think>C or D?</think><answer>(A)</answer>", kv_transfer_params={"visual_attention": SCORES})
    with HttpEndpoint(lambda body, before: answer) as http:
        yield http


@pytest.fixture
def evaluate(tmp_path, server):
    """Runs `avar eval --harness`; returns the exit status and the model's folder."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {harness_standin.__file__} "$@"\n')
    python.chmod(0o755)

    def run(*words, suite="avar7", harness="lmms-eval", kind="parquet"):
        write_copies(tmp_path / kind, kind)
        given = ["--model", "org/model", "--suite", suite, "--data", str(tmp_path / kind), "--server", server.url]
        given += ["--harness", harness, "--harness-python", str(python), "--out", str(tmp_path / "out")]
        return main(["eval", *given, *words]), tmp_path / "out" / "model"

    return run


def test_a_harness_asks_and_scores_the_seven_and_its_verdicts_are_the_table(evaluate, server):
    status, folder = evaluate()
    results = pd.read_parquet(folder / "results.parquet")
    asked = pd.read_parquet(folder / "questions.parquet", columns=["benchmark", "id"])
    assert status == 0 and results[["benchmark", "id"]].values.tolist() == asked.values.tolist()
    assert set(results["scored_by"]) == {"lmms-eval 9.9"} and not results["right"].any()  # it wants "A"
    both = pd.read_parquet(folder / "harness" / "lmms-eval" / "results.parquet")
    ours = both[both["scored_by"] == "rules"]
    assert (ours["right"] == (ours["answer"] == "A")).all() and ours["right"].any()
    assert (results["vas"] == 0.6).all() and (results["response"].str.contains("C or D")).all()
    assert {body["messages"][0]["content"] for body in server.bodies} == {SYSTEM}
    assert all("max_tokens" not in body for body in server.bodies)  # its 128 would cut a chain of thought
    drawn = [json.dumps(body) for body in server.bodies if "Answer the question in the image." in json.dumps(body)]
    assert drawn and not any("A. " in text for text in drawn)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["harness"] == "lmms-eval 9.9" and summary["scored_by"]["mmstar"] == "lmms-eval 9.9"
    (line,) = [line for line in summary["agreement"] if line.startswith("mmstar")]
    right = int(ours[ours["benchmark"] == "mmstar"]["right"].sum())
    n = int((asked["benchmark"] == "mmstar").sum())
    assert line == (
        f"mmstar: of {n} answers 0 are right by lmms-eval 9.9, {right} by our rules; they differ on {right}"
    )
    assert (folder.parent / "report" / "index.html").exists()
    before = len(server.bodies)
    assert evaluate()[0] == 0 and len(server.bodies) == before  # all stored
    assert evaluate("--protocol", "harness", suite="mmstar")[0] == 0
    assert all(turn["role"] == "user" for body in server.bodies[before:] for turn in body["messages"])


@pytest.mark.parametrize(
    ("words", "given", "told"),
    [
        (["--controls"], {}, "leave out --harness"),
        (["--protocol", "direct"], {}, "there are think and harness"),
        (["--judge", "http://127.0.0.1:9/v1", "--judge-model", "j"], {}, "lmms-eval scores local files by its rules"),
        (["--judge-model", "j"], {}, "--judge http://HOST:PORT/v1 and --judge-model"),
        (["--limit", "2"], {"harness": "vlmevalkit"}, "VLMEvalKit reads its files whole"),
        ([], {"suite": "mmstar,miniature"}, "one protocol"),
        ([], {"suite": "mmstar", "harness": "vlmevalkit"}, "VLMEvalKit wants MMStar.tsv"),
        ([], {"suite": "mmstar", "harness": "vlmevalkit", "kind": "tsv"}, "name it by --harness-path"),
    ],
)
def test_what_a_harness_can_not_be_asked_is_one_line(evaluate, server, capsys, words, given, told):
    status, folder = evaluate(*words, **given)
    said = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and told in said[-1] and len(said) == 1 and not server.bodies
    assert not (folder / "results.parquet").exists()


def test_vlmevalkit_is_given_its_files_and_its_own_names_of_questions(tmp_path):
    write_copies(tmp_path / "tsv")
    names = ("mmstar", "mmmu_pro", "mathvista")
    plan = Plan("s", [indexed(load_definition(name)) for name in names], tmp_path / "out", tmp_path / "tsv")
    questions(plan, tmp_path / "out" / "m")
    found = list(tables(plan, tmp_path / "out" / "m"))
    assert [(one.name, one.kind, one.prefix) for one in found] == [
        ("MMStar", None, ""),
        ("MMMU_Pro_10c", None, "standard/"),
        ("MMMU_Pro_V", None, "vision/"),
        ("MathVista_MINI", None, ""),
    ]
    for one in found:
        indices = pd.read_csv(one.file, sep="\t", dtype=str)["index"].tolist()
        assert [question["id"] for question in one.questions] == [one.prefix + index for index in indices]
    (tmp_path / "tsv" / "MathVista_MINI.tsv").rename(tmp_path / "tsv" / "mathvista.tsv")
    (own,) = (one for one in tables(plan, tmp_path / "out" / "m") if "athvista" in one.name)
    assert (own.name, own.kind) == ("mathvista", "MathVista")
    (tmp_path / "tsv" / "MMMU_Pro_V.tsv").rename(tmp_path / "tsv" / "mmmu_pro_vision.tsv")
    with pytest.raises(ConfigError, match=r"call it MMMU_Pro_V\.tsv"):
        list(tables(plan, tmp_path / "out" / "m"))
    with pytest.raises(ConfigError, match="knows no TSV file"):
        indexed(load_definition("miniature"))


def test_of_two_verdicts_the_harness_own_is_kept_in_the_place_of_the_question():
    def row(name, by, right, repeat=0):
        return {"benchmark": "b", "id": name, "repeat": repeat, "scored_by": by, "right": right}

    rows = [row("1", "rules", True), row("1", "kit", False), row("2", "rules", True), row("1", "rules", True, 1)]
    assert chosen(rows) == [rows[1], rows[2], rows[3]]
