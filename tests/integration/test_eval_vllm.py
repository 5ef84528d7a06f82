"""`avar eval` as a user types it, against `avar serve`: copies of the seven benchmarks, kills, restarts, a harness."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import pyarrow.parquet as pq
import pytest
from benchmark_copies import write_copies
from servers import MODEL

from verl_avar.errors import ConfigError
from verl_avar.evaluation.benchmark.harness import lmms_eval
from verl_avar.evaluation.benchmark.harness.settings import (
    Benchmark,
    Endpoint,
    HarnessSettings,
    Protocol,
    harness_python,
)
from verl_avar.evaluation.benchmark.schema import CONTROLS, PLAIN
from verl_avar.evaluation.benchmark.score import score
from verl_avar.miniature import base_path

# What benchmark_copies.py makes, without the rows that are no part of a benchmark.
QUESTIONS = {
    "mathvista": 4, "mathvision": 3, "mathverse_vo": 2, "mmmu_val": 3, "mmmu_pro": 4, "mmstar": 2, "hallusionbench": 3,
}  # fmt: skip
CONDITIONS = (PLAIN, *CONTROLS)
TABLES = ("table.md", "table.tex", "table.csv")
ATTENTION = ("visual_mass", "system_mass", "visual_ratio", "visual_share", "vas")
CONCURRENCY = 4
REQUESTS = "vllm:request_success_total"


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Folders of both published forms."""
    folder = tmp_path_factory.mktemp("copies")
    for kind in ("tsv", "parquet"):
        write_copies(folder / kind, kind)
    return folder


class Command:
    """`avar eval` on a folder of copies, in a process of its own."""

    def __init__(self, server, data, out, *more):
        words = ["--suite", "avar7", "--data", str(data), "--server", f"{server.url}/v1", "--model", str(base_path())]
        words += ["--served-name", MODEL, "--name", MODEL, "--out", str(out), "--max-tokens", "64"]
        words += ["--concurrency", str(CONCURRENCY), *more]
        self.folder = out / MODEL
        self.process = subprocess.Popen(
            [sys.executable, "-m", "verl_avar.cli", "eval", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def ended(self) -> str:
        """What it said; it must end well."""
        said, _ = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, said
        return said

    def killed(self, holds) -> bool:
        """kill -9 as soon as `holds()`; whether it was still running."""
        while not holds() and self.process.poll() is None:
            time.sleep(0.002)
        self.process.kill()
        self.process.communicate()
        return self.process.returncode == -signal.SIGKILL


def lines(folder):
    """Whole lines of stored answers, read without the code under test; a kill may leave a torn one."""
    found = []
    for path in sorted((folder / "calls").glob("*.jsonl")):
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                found.append(json.loads(line))
    return found


def rows(folder, file="results.parquet"):
    return pq.read_table(folder / file).to_pylist()


def without(row, *names):
    return {name: value for name, value in row.items() if name not in names}


def requests(server):
    """How many requests the server has answered or given up since it started."""
    return sum(value for name, value in server.metrics().items() if name.startswith(REQUESTS))


@pytest.fixture(scope="module")
def undisturbed(miniature_server, copies, tmp_path_factory):
    """The folder of a run that nothing happened to: TSV copies, all controls."""
    out = tmp_path_factory.mktemp("undisturbed")
    before = requests(miniature_server)
    said = Command(miniature_server, copies / "tsv", out, "--controls").ended()
    assert "answers to 21 questions" in said and "MathVista" in said
    keys = {line["key"] for line in lines(out / MODEL)}
    assert requests(miniature_server) - before == len(lines(out / MODEL)) == len(keys)
    return out


def test_every_question_of_the_seven_is_asked_answered_scored_and_weighed(undisturbed):
    results, asked = rows(undisturbed / MODEL), rows(undisturbed / MODEL, "questions.parquet")
    assert Counter(question["benchmark"] for question in asked) == QUESTIONS
    alike = Counter((question["benchmark"], len(question["images"])) for question in asked)
    expected = [
        (condition, question)
        for condition in CONDITIONS
        for question in asked
        if condition != "other_image" or alike[question["benchmark"], len(question["images"])] > 1
    ]
    assert 4 * 21 < len(expected) < 5 * 21
    names = [(condition, question["benchmark"], question["id"]) for condition, question in expected]
    assert [(row["condition"], row["benchmark"], row["id"]) for row in results] == names
    for row, (_, question) in zip(results, expected, strict=True):
        system, user = json.loads(row["prompt"])
        assert (system["role"], user["role"]) == ("system", "user") and "<answer>" in system["content"]
        images = 0 if row["condition"] == "no_image" else len(question["images"])
        assert user["content"].count("<image>") == images and (images or row["condition"] == "no_image")
        assert (row["finish"], row["scored_by"], row["repeat"]) == ("stop", "rules", 0)
        assert row["prompt_tokens"] > 100 and 0 < row["completion_tokens"] <= 64 and row["seconds"] > 0
        figures = [row[name] for name in ATTENTION]
        assert row["system_mass"] > 0
        assert all(figure > 0 for figure in figures) if images else row["vas"] == row["visual_mass"] == 0
        scored = score(question, row["response"], row["finish"])
        assert (row["extracted"], row["right"], row["problem"]) == (scored.extracted, scored.right, scored.problem)


def test_the_report_has_what_was_stored(undisturbed):
    report, results = undisturbed / "report", rows(undisturbed / MODEL)
    summary = json.loads((undisturbed / MODEL / "summary.json").read_text())
    assert (summary["questions"], summary["broken"], summary["conditions"]) == (21, 0, list(CONDITIONS))
    page = (report / "index.html").read_text()
    assert "HallusionBench" in page and not re.search(r"(src|href)=.?http", page)
    assert all((report / name).stat().st_size for name in TABLES) and list((report / "figures").glob("*.png"))
    # The accuracy of a benchmark whose metric is just that, by hand.
    plain = [row["right"] for row in results if row["benchmark"] == "mathvista" and row["condition"] == PLAIN]
    header, *body = (line.split(",") for line in (report / "table.csv").read_text().splitlines())
    (line,) = (row for row in body if row[0] == "run" and row[2] == "mathvista")
    found = dict(zip(header, line, strict=True))
    assert (found["value"], found["asked"], found["questions"]) == (str(100 * sum(plain) / 4), "4", "1000")


def test_both_published_forms_are_the_same_questions_with_the_same_answers(
    miniature_server, copies, undisturbed, tmp_path
):
    Command(miniature_server, copies / "parquet", tmp_path).ended()
    ours = rows(tmp_path / MODEL)
    theirs = [row for row in rows(undisturbed / MODEL) if row["condition"] == PLAIN]
    differ = ("id", "meta", "seconds")  # each form has ids and facts of its own
    assert [without(row, *differ) for row in ours] == [without(row, *differ) for row in theirs]
    assert (tmp_path / "report" / "table.md").read_text() == (undisturbed / "report" / "table.md").read_text()


def test_kills_of_command_and_server_leave_no_trace_in_the_results(miniature_server, copies, undisturbed, tmp_path):
    chance, data = random.Random(7), copies / "tsv"
    folder, whole = tmp_path / MODEL, len(lines(undisturbed / MODEL))

    def start():
        return Command(miniature_server, data, tmp_path, "--controls")

    before = requests(miniature_server)
    assert start().killed(lambda: any(folder.glob(".questions.parquet.*")) or (folder / "questions.parquet").exists())
    first, second, third = (share * whole for share in sorted(chance.uniform(0.05, 0.9) for _ in range(3)))
    for moment in (first, second):
        assert start().killed(lambda least=moment: len(lines(folder)) >= least)
        assert moment <= len(lines(folder)) < whole
    # Of a kill, what was in flight is asked again.
    assert 0 <= requests(miniature_server) - before - len(lines(folder)) <= 2 * CONCURRENCY

    command = start()
    try:
        while len(lines(folder)) < third and command.process.poll() is None:
            time.sleep(0.002)
        miniature_server.kill(*miniature_server.processes())
        assert command.process.poll() is None  # it tries again
    finally:
        miniature_server.start_again()
        command.killed(lambda: True)
        miniature_server.wait()
    there = len(lines(folder))
    assert there < whole

    assert start().killed(lambda: any(folder.glob(".results.parquet.*")) or (folder / "results.parquet").exists())
    assert f"{len(rows(undisturbed / MODEL)):,} of them there already" in start().ended()
    assert requests(miniature_server) == whole - there  # since it started again
    stored = [line["key"] for line in lines(folder)]
    assert len(stored) == len(set(stored)) == whole

    found, wanted = rows(folder), rows(undisturbed / MODEL)
    assert [without(row, "seconds") for row in found] == [without(row, "seconds") for row in wanted]
    for name in TABLES:
        assert (tmp_path / "report" / name).read_bytes() == (undisturbed / "report" / name).read_bytes()
    assert not [path for path in tmp_path.rglob(".*") if path.name != ".lock"]


def test_a_harness_scores_a_local_benchmark_on_the_same_server(miniature_server, undisturbed, tmp_path):
    try:
        python = harness_python()
        theirs = f"lmms-eval {lmms_eval.version(python)}"
    except ConfigError as reason:
        pytest.skip(str(reason))
    table = pq.read_table(undisturbed / MODEL / "questions.parquet")
    choices = table.filter([benchmark in ("mmstar", "mathvista") for benchmark in table["benchmark"].to_pylist()])
    pq.write_table(choices, tmp_path / "mine.parquet")
    settings = HarnessSettings(
        tmp_path,
        Endpoint(f"{miniature_server.url}/v1", MODEL),
        (Benchmark("mine", tmp_path / "mine.parquet"),),
        Protocol(max_tokens=64),
        python=python,
    )
    found = rows(lmms_eval.run(settings).parent)
    asked = [(row["benchmark"], row["id"]) for row in choices.to_pylist()]
    verdicts = {
        by: {(row["benchmark"], row["id"]): row["right"] for row in found if row["scored_by"] == by}
        for by in ("rules", theirs)
    }
    assert len(found) == 2 * len(asked) and all(set(of) == set(asked) for of in verdicts.values())
    about = json.loads((tmp_path / "harness" / "lmms-eval" / "harness.json").read_text())
    listed = {(line["benchmark"], one["id"]) for line in about["agreement"] for one in line["disagree"]}
    assert listed == {key for key in asked if verdicts["rules"][key] != verdicts[theirs][key]}
    assert about["unscored"] == []
