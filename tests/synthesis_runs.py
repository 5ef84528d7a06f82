"""Whole runs of `avar synth run` as a user starts them, against the exact teacher's endpoint, and what must come out.

What a run leaves is held against the texts alone: the teacher's rules say what each of them should be, and its own
counts say what was paid for.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import yaml

from verl_avar.miniature import teacher
from verl_avar.miniature.data import write_questions
from verl_avar.miniature.teacher_endpoint import STAGES
from verl_avar.miniature.teacher_server import Teacher

SHARE = 0.05
KINDS = ("rate_limit", "server_error", "timeout", "cut", "malformed", "wrong_answer", "leak", "refusal")
FAULTS = dict.fromkeys(KINDS, SHARE)
TEXTS = ("description", "chain", "anchored")
HOLD_S = 10.0  # of a timeout: longer than any client here waits
CLI = [sys.executable, "-m", "verl_avar.cli", "synth", "run"]
QUIET_S = 0.05  # between looks at a run


def settings(out: Path, questions: Path, url: str, **endpoint) -> dict:
    """A config for the miniature's rows: limits for its short chains, and attempts that outlast its faults."""
    stages = {stage: {"endpoint": "teacher", "model": model} for model, stage in STAGES.items()}
    short = {"min_words": 5, "max_repeated": 1.0}
    return {
        "name": "runs",
        "out": str(out),
        "sources": [{"path": str(questions)}],
        "endpoints": {
            "teacher": {
                "base_url": url, "concurrency": 64, "timeout_s": 2.0, "attempts": 12, "backoff_s": 0.1,
                "backoff_max_s": 2.0,
            } | endpoint,
        },
        "stages": stages,
        "checks": {
            "describe": {"min_words": 2},
            "reason": short,
            "anchor": {**short, "min_anchors": 1, "min_spread": 0.0},
        },
        "duplicates": {"near": False},
    }  # fmt: skip


def write_config(path: Path, given: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(given, sort_keys=False), encoding="utf-8")
    return path


@dataclass
class Ended:
    """A run that is over. peak_mb: most resident memory of the process; seconds: from its start to its end."""

    code: int
    output: str
    errors: str
    peak_mb: float
    seconds: float


class Started:
    """`avar synth run` in a process of its own, its memory watched; killed with the context if it still runs."""

    def __init__(self, config: Path, *arguments: str, environment: dict[str, str] | None = None):
        self.log, self.error_log = (config.with_suffix(f".{name}.log") for name in ("out", "err"))
        self.began, self.peak = time.monotonic(), 0
        with self.log.open("w") as out, self.error_log.open("w") as errors:
            self.process = subprocess.Popen(
                [*CLI, str(config), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **(environment or {})},
            )
        self.watcher = threading.Thread(target=self._watch)
        self.watcher.start()

    def _watch(self) -> None:
        process = psutil.Process(self.process.pid)
        while self.process.poll() is None:
            try:
                self.peak = max(self.peak, process.memory_info().rss)
            except psutil.NoSuchProcess:
                break
            time.sleep(QUIET_S)

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.watcher.join()

    def until(self, holds, timeout: float = 120) -> bool:
        """Waits until `holds()`, or until the run is over; returns whether it held first."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if holds():
                return True
            if self.process.poll() is not None:
                return False
            time.sleep(0.01)
        raise AssertionError(f"nothing happened within {timeout} s: {self.log.read_text()}{self.error_log.read_text()}")

    def ended(self, timeout: float = 1800) -> Ended:
        code = self.process.wait(timeout)
        self.watcher.join()
        seconds = time.monotonic() - self.began
        return Ended(code, self.log.read_text(), self.error_log.read_text(), self.peak / 2**20, seconds)


def run(config: Path, *arguments: str, environment: dict[str, str] | None = None) -> Ended:
    with Started(config, *arguments, environment=environment) as started:
        return started.ended()


def run_with_kills(config: Path, out: Path, moments: list[float], whole: int) -> tuple[list[Ended], int]:
    """Runs until a run ends by itself; kill -9 when the stored calls have come to each share of `whole` bytes.

    Returns the runs, killed ones among them, and how many were killed.
    """
    runs = []
    for moment in sorted(moments):
        with Started(config) as started:
            if started.until(lambda least=moment * whole: stored_bytes(out) >= least, timeout=1800):
                started.process.send_signal(signal.SIGKILL)
            runs.append(started.ended())
    killed = sum(one.code == -signal.SIGKILL for one in runs)
    return [*runs, run(config)], killed


def stored_bytes(out: Path) -> int:
    return sum(path.stat().st_size for path in (out / "calls").glob("*.jsonl"))


def stored(out: Path, folder: str = "calls") -> list[dict]:
    """Every whole line of the shards, read without the code under test; a killed run may leave a torn one."""
    lines = [line for path in sorted((out / folder).glob("*.jsonl")) for line in path.read_bytes().split(b"\n") if line]
    calls = []
    for line in lines:
        try:
            calls.append(json.loads(line))
        except ValueError:
            assert not line.endswith(b"}"), line
    return calls


def outcomes(out: Path) -> list[dict]:
    return pq.read_table(out / "outcomes.parquet").to_pylist()


def decided(rows: list[dict]) -> dict[tuple[str, int], tuple]:
    """What must be the same however a run came about: of each row its status, stage, reason and texts."""
    columns = ("status", "stage", "reason", *TEXTS)
    return {(row["source"], row["source_row"]): tuple(row[name] for name in columns) for row in rows}


def expected(question: dict, row: dict) -> tuple[str, str | None, str | None]:
    """(status, stage, reason) of a row by its texts and the teacher's rules. Raises AssertionError where a text is
    neither what the teacher's rules give nor one of the faults asked for."""
    description, chain, anchored = (row[name] for name in TEXTS)
    if description in teacher.REFUSALS:
        assert chain is None and anchored is None
        return "rejected", "describe", "refusal"
    assert description == teacher.describe(teacher.read_scene(question["images"][0]["bytes"]))
    if chain in teacher.REFUSALS:
        assert anchored is None
        return "rejected", "reason", "refusal"
    right = teacher.reason(description, question["question"].removeprefix("<image>"))
    assert right.endswith(f"<answer>{question['answer']}</answer>")
    if chain != right:
        assert chain.startswith("<think>") and not chain.endswith(f"<answer>{question['answer']}</answer>")
        assert anchored is None
        return "rejected", "reason", "wrong_answer"
    if anchored in teacher.REFUSALS:
        return "rejected", "anchor", "refusal"
    if anchored != teacher.anchor(right):
        assert any(appeal in anchored for appeal, _ in teacher.APPEALS)
        return "rejected", "anchor", "leak"
    return "accepted", None, None


def misjudged(questions: Path, rows: list[dict]) -> list[str]:
    """A line, or none, about rows that are missing, there twice, pending, or not what their texts say.

    Intake leaves out the sources' duplicates; `expected` says the rest.
    """
    asked = {row["source_row"]: row for row in pq.read_table(questions).to_pylist()}
    found = Counter(row["source_row"] for row in rows)
    wrong = [f"row {number}: {found[number]} times" for number in asked.keys() | found.keys() if found[number] != 1]
    first: dict[str, int] = {}
    for number in sorted(asked):
        first.setdefault(asked[number]["id"], number)
    for row in rows:
        question, seen = asked[row["source_row"]], (row["status"], row["stage"], row["reason"])
        try:
            again = first[question["id"]] != row["source_row"]
            right = ("rejected", "intake", "duplicate") if again else expected(question, row)
        except AssertionError as error:
            texts = [row[name] for name in TEXTS]
            wrong.append(f"row {row['source_row']}: a text that the teacher does not write: {texts} {error}")
            continue
        if seen != right:
            wrong.append(f"row {row['source_row']}: {seen}, its texts say {right}")
    return [f"{len(wrong)} rows are wrong; {'; '.join(wrong[:3])}"] if wrong else []


@dataclass
class Comparison:
    """What `compare` saw; `failures` are the checks that do not hold, one line each."""

    rows: int
    accepted: int
    rejected: int
    reasons: dict[str, int]  # stage: reason
    requests: int
    calls: int
    share: float  # of the stated rate, by the teacher's clock
    own_share: float  # the same, by summary.json
    limited: int  # requests that the teacher refused for exceeding its rate
    different: int  # rows of other outcomes or texts in the run with kills
    twice: int  # calls answered more than once in the run with kills
    kills: int
    peak_mb: float
    seconds: float
    failures: list[str]


def compare(
    folder: Path,
    rows: int,
    per_minute: float | None,
    kills: int,
    seed: int,
    wanted_share: float = 0.0,
) -> Comparison:
    """`rows` questions once through, and in a second folder with `kills` times kill -9 and reruns.

    per_minute: the rate that the endpoint states and refuses more than, of which `wanted_share` must be used; None: no
    limit.
    """
    questions = write_questions(folder / "questions.parquet", rows, seed)
    failures, rng = [], random.Random(f"kills {seed}")

    def wanted(holds: bool, words: str) -> None:
        if not holds:
            failures.append(words)

    def started(name: str, server: Teacher) -> tuple[Path, Path, dict]:
        given = settings(folder / name, questions, server.url, requests_per_minute=per_minute)
        return write_config(folder / f"{name}.yaml", given), folder / name, given["endpoints"]["teacher"]

    with Teacher(FAULTS, requests_per_minute=per_minute, hold_s=HOLD_S, seed=seed) as server:
        config, through, endpoint = started("through", server)
        once, stats = run(config), server.stats()
    wanted(once.code == 0, f"the run ended with {once.code}: {once.output[-2000:]}{once.errors[-2000:]}")
    made, calls = outcomes(through), stored(through)
    failures += misjudged(questions, made)
    summary = json.loads((through / "summary.json").read_text())
    wanted(
        (summary["accepted"], summary["rejected"], summary["pending"]) == _counts(made),
        f"summary.json counts other rows than outcomes.parquet: {_counts(made)}",
    )
    late = sum(part["retries"].get("timeout", 0) for part in summary["stages"].values()) - stats["responses"]["timeout"]
    paid = sum(stats["texts"].values()) - len(calls)
    wanted(0 <= paid <= max(0, late), f"{paid} calls were answered twice; {late} answers came too late")
    wanted(len({call["key"] for call in calls}) == len(calls), "a call is stored twice")
    faulty = Counter(row["reason"] for row in made if row["stage"] in ("describe", "reason", "anchor"))
    for kind in ("wrong_answer", "leak", "refusal") if paid == 0 else ():
        served = stats["texts"].get(kind, 0)
        wanted(faulty[kind] == served, f"{served} answers had the fault {kind}, {faulty[kind]} rejected rows have it")
    requests = sum(stats["requests"].values())
    share = rate(stats) / (per_minute or math.inf)
    own_share = summary["endpoints"]["teacher"]["requests_per_minute"] / (per_minute or math.inf)
    wanted(share >= wanted_share, f"{share:.1%} of the stated rate were used, wanted {wanted_share:.0%}")

    with Teacher(FAULTS, requests_per_minute=per_minute, hold_s=HOLD_S, seed=seed + 1) as server:
        config, killed_folder, _ = started("killed", server)
        moments = [rng.uniform(0.02, 0.95) for _ in range(kills)]
        runs, killed = run_with_kills(config, killed_folder, moments, stored_bytes(through))
        stats_killed = server.stats()
    wanted(runs[-1].code == 0, f"the last run ended with {runs[-1].code}: {runs[-1].output[-2000:]}{runs[-1].errors}")
    wanted(killed == kills, f"{killed} of {kills} runs were killed")
    again = outcomes(killed_folder)
    failures += misjudged(questions, again)
    ours, theirs = decided(made), decided(again)
    different = [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]
    wanted(not different, f"{len(different)} rows differ after kills and reruns, such as {different[:3]}")
    after = stored(killed_folder)
    keys = {call["key"] for call in after}
    wanted(keys == {call["key"] for call in calls}, "other calls were made after kills and reruns")
    wanted(len(keys) == len(after), "a call is stored twice after kills and reruns")
    twice = sum(stats_killed["texts"].values()) - len(keys)
    allowed = killed * endpoint["concurrency"] + max(0, late)
    wanted(0 <= twice <= allowed, f"{twice} calls were answered twice, at most {allowed} were in flight at kills")
    reasons = Counter(f"{row['stage']}: {row['reason']}" for row in made if row["reason"])
    return Comparison(
        rows=rows,
        accepted=summary["accepted"],
        rejected=summary["rejected"],
        reasons=dict(reasons.most_common()),
        requests=requests,
        calls=len(calls),
        share=share,
        own_share=own_share,
        limited=stats["responses"].get("limited", 0),
        different=len(different),
        twice=twice,
        kills=killed,
        peak_mb=once.peak_mb,
        seconds=once.seconds,
        failures=failures,
    )


def rate(stats: dict) -> float:
    """Requests a minute, by the teacher's clock."""
    return 60 * (sum(stats["requests"].values()) - 1) / (stats["last"] - stats["first"])


def _counts(rows: list[dict]) -> tuple[int, int, int]:
    status = Counter(row["status"] for row in rows)
    return status["accepted"], status["rejected"], status["pending"]
