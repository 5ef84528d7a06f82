"""One model on a suite: questions, a server, answers, scores, summary.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from verl_avar.calls.store import CALLS, Lines, locked, remove_parts, write_whole
from verl_avar.data.published import file_states
from verl_avar.evaluation.benchmark.definition import Benchmark
from verl_avar.evaluation.benchmark.judge import RULES, Judge
from verl_avar.evaluation.benchmark.load import load
from verl_avar.evaluation.benchmark.predict import (
    QUESTIONS_FILE,
    Settings,
    cases,
    predict,
    write_questions,
    write_results,
)
from verl_avar.evaluation.benchmark.server import served
from verl_avar.evaluation.partial import fingerprint

ATTEMPTS = 12  # of a call: a server that is started again loads for minutes
SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class Plan:
    """What is to be run on every model alike. data: local copies (load.py); None: the hub's."""

    suite: str
    benchmarks: Sequence[Benchmark]
    out: Path
    data: Path | None = None
    limit: int | None = None
    allow_broken: bool = False
    protocol: str | None = None
    conditions: tuple[str, ...] = ("plain",)
    repeats: int = 1
    seed: int = 0
    sampling: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0.0})
    attention: str = "summary"
    concurrency: int = 16
    timeout_s: float = 1800.0
    serve: Sequence[str] = ()  # options of `avar serve`, where it is started here
    judge: Judge | None = None  # None: rules alone decide


@dataclass(frozen=True)
class Model:
    """path: a checkpoint or hub name. url: of a server that serves it; None: one is started here."""

    path: str
    name: str
    url: str | None = None
    served_name: str | None = None
    api_key_env: str | None = None


def folder_name(name: str) -> str:
    """A model's name as a folder's."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "model"


def run(plan: Plan, model: Model, console: Console) -> Path:
    """Asks and scores what is missing; returns the model's folder. Raises ConfigError and EndpointError."""
    folder = plan.out / folder_name(model.name)
    sent = model.served_name or (model.name if model.url is None else model.path)
    settings = Settings(
        model=sent,
        identity=fingerprint(model.path),
        protocol=plan.protocol,
        conditions=plan.conditions,
        repeats=plan.repeats,
        seed=plan.seed,
        sampling=dict(plan.sampling),
        attention=plan.attention,
    )
    protocols = {benchmark.name: benchmark.protocol for benchmark in plan.benchmarks}
    with locked(folder):
        remove_parts(folder)
        count, broken = questions(plan, folder)
        total, left = counted(folder, settings, protocols)
        console.print(
            f"{model.name}: {total:,} answers to {count:,} questions, {total - left:,} of them there already"
            + (f"; {broken} broken rows are left out" if broken else ""),
            highlight=False,
        )
        failed = 0
        if left:
            server = (
                nullcontext(model.url) if model.url else served(model.path, sent, folder / "server.txt", plan.serve)
            )
            with server as url, bar(f"{model.name}", total, console) as advance:
                endpoint = {
                    "base_url": url,
                    "api_key_env": model.api_key_env,
                    "concurrency": plan.concurrency,
                    "timeout_s": plan.timeout_s,
                    "attempts": ATTEMPTS,
                }
                failed = predict(folder, settings, protocols, endpoint, advance)
        judged = write_results(folder, settings, protocols, plan.judge)
        about = summary(plan, model, count, broken) | ({"judge": judged} if judged else {})
        write_whole(folder / SUMMARY_FILE, json.dumps(about, indent=1, ensure_ascii=False))
    if failed:
        console.print(f"{model.name}: {failed} answers did not come; the same command asks again", highlight=False)
    if judged:
        console.print(f"{model.name}: {said(judged)}", highlight=False)
    return folder


def said(judged: Mapping[str, Any]) -> str:
    """The counts of judge.judge_all as a line."""
    line = f"{judged['judged']:,} answers judged by {judged['name']}"
    if judged["models"] and judged["models"] != [judged["name"]]:
        line += f" (which calls itself {', '.join(judged['models'])})"
    line += f", {judged['only_judge'] + judged['only_rules']:,} of them against the rules"
    for kind, words in (("unreadable", "verdicts that can't be read"), ("failed", "that did not come")):
        line += f"; {judged[kind]:,} {words}: the rules count" if judged[kind] else ""
    return line


def counted(folder: Path, settings: Settings, protocols: Mapping[str, str]) -> tuple[int, int]:
    """How many cases there are, and how many of them have no stored answer."""
    with Lines(folder / CALLS) as stored:
        missing = [stored.get(case.key) is None for case in cases(folder, settings, dict(protocols))]
    return len(missing), sum(missing)


def summary(plan: Plan, model: Model, count: int, broken: int) -> dict:
    """What a reader must know to judge the results."""
    return {
        "model": model.path,
        "name": model.name,
        "suite": plan.suite,
        "protocol": plan.protocol or "each benchmark's own",
        "harness": "native",
        "server": "started here" if model.url is None else model.url,
        "sampling": dict(plan.sampling),
        "seed": plan.seed,
        "repeats": plan.repeats,
        "conditions": list(plan.conditions),
        "limit": plan.limit,
        "questions": count,
        "broken": broken,
        "benchmarks": {
            benchmark.name: {"title": benchmark.title, "questions": benchmark.questions, "metric": benchmark.metric}
            for benchmark in plan.benchmarks
        },
        "scored_by": RULES if plan.judge is None else f"{plan.judge.model}, where its verdict can't be read {RULES}",
        "versions": {name: version(name) for name in ("verl_avar", "math-verify", "openai")},
    }


def questions(plan: Plan, folder: Path) -> tuple[int, int]:
    """Writes questions.parquet unless that was done from the same copies; returns questions and broken rows."""
    told = json.dumps(
        [
            [asdict(benchmark) for benchmark in plan.benchmarks],
            [] if plan.data is None else file_states(plan.data),
            plan.limit,
            plan.allow_broken,
        ],
        sort_keys=True,
        default=str,
    )
    path = folder / "questions.json"
    if path.exists() and (folder / QUESTIONS_FILE).exists():
        known = json.loads(path.read_text())
        if known["from"] == told:
            return known["questions"], known["broken"]
    path.unlink(missing_ok=True)
    broken: list = []
    count = write_questions(
        (
            question
            for benchmark in plan.benchmarks
            for question in load(benchmark, plan.data, plan.limit, plan.allow_broken, broken)
        ),
        folder,
    )
    write_whole(path, json.dumps({"from": told, "questions": count, "broken": len(broken)}))
    return count, len(broken)


@contextmanager
def bar(title: str, total: int, console: Console) -> Iterator:
    from rich.progress import Progress

    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(title, total=total)
        yield lambda done: progress.advance(bar, done)
