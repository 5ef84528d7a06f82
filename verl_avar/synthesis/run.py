"""A synthesis run: intake, calls, what became of every row, selection, outputs. Run again, it does what is missing.

OUT/rows.parquet, intake.parquet    rows as every stage reads them, and those that were refused (intake.py)
OUT/calls/, failures/               answered calls, and those that no attempt got an answer to (store.py)
OUT/retries.jsonl                   what `--retry` sent again
OUT/outcomes.parquet                each row of the sources once: accepted, rejected with a reason, or pending
OUT/runs/                           of every run: requests, failed ones by kind, time
OUT/summary.json, README.md, …      outputs
"""

from __future__ import annotations

import json
import os
import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from verl_avar.synthesis.outcomes import STAGES
from verl_avar.synthesis.pipeline import ROWS_FILE, RUNS, Progress, Spent, read_rows, run_calls
from verl_avar.synthesis.prompt import check, template_hash
from verl_avar.synthesis.settle import settle
from verl_avar.synthesis.store import CALLS, Lines, writer_name

SUMMARY_FILE = "summary.json"
SIGNALLED = "asked to end"


def check_prompts(config: DictConfig) -> None:
    """Raises ConfigError for a prompt that could not be rendered, before anything is read or sent."""
    for stage in STAGES:
        check(config.stages[stage].prompt, stage)


def prepare(config: DictConfig, out: Path) -> dict:
    """Intake, and a copy of the settings in OUT/config.yaml; returns intake's counts."""
    from verl_avar.synthesis.intake import intake

    counts = intake(config, out)
    _write(out / "config.yaml", OmegaConf.to_yaml(config))
    return counts


def make_calls(config: DictConfig, out: Path, progress: Progress, ray: str | None = None, workers: int = 1) -> None:
    """All calls that are missing, in this process or on a Ray cluster at the address `ray`.

    SIGINT and SIGTERM end it after the requests in flight. Raises EndpointError as `run_calls` does.
    """
    progress.spent = spent(out)
    with _stopped_by_signals(progress):
        if ray is None:
            run_calls(config, out, read_rows(out / ROWS_FILE), writer_name(), progress)
        else:
            from verl_avar.synthesis.ray_data import run_on_ray

            run_on_ray(config, out, run_block, ray, workers)


def run_block(config: DictConfig, out: Path, rows: list[dict], writer: str) -> dict:
    """The calls of some rows, by one worker of a cluster; returns how many rows got how far."""
    progress = Progress()
    run_calls(config, out, rows, writer, progress)
    return dict(progress.rows)


def spent(out: Path) -> Spent:
    """Tokens and cost of all calls so far."""
    total = Spent()
    with Lines(out / CALLS) as stored:
        for call in stored:
            total.add(call)
    return total


def conclude(config: DictConfig, out: Path) -> dict:
    """outcomes.parquet, selection by attention, summary.json and the outputs; returns the summary."""
    from verl_avar.synthesis.card import write_card
    from verl_avar.synthesis.outputs import write_outputs
    from verl_avar.synthesis.viewer import write_viewer

    settle(config, out)
    attention = None
    if config.attention.model is not None:
        from verl_avar.synthesis.attention import apply

        attention = apply(config, out)
    summary = summarise(config, out, attention)
    write_outputs(config, out)
    write_viewer(config, out)
    write_card(config, out, summary)
    _write(out / SUMMARY_FILE, json.dumps(summary, indent=1, ensure_ascii=False))
    return summary


def summarise(config: DictConfig, out: Path, attention: dict | None) -> dict:
    """Counts of rows by status, reason and source; calls, retries, tokens, cost and latency by stage."""
    from verl_avar.synthesis.settle import OUTCOMES_FILE

    status, reasons = Counter(), defaultdict(Counter)
    sources: dict[str, Counter] = defaultdict(Counter)
    for row in read_rows(out / OUTCOMES_FILE):
        status[row["status"]] += 1
        sources[row["source"]]["rows"] += 1
        sources[row["source"]]["accepted"] += row["status"] == "accepted"
        if row["reason"] is not None:
            reasons[row["stage"]][row["reason"]] += 1
    totals = {stage: Counter() for stage in STAGES}
    with Lines(out / CALLS) as stored:
        for call in stored:
            totals[call["stage"]].update(calls=1, **{k: call[k] for k in ("prompt_tokens", "completion_tokens")})
            totals[call["stage"]].update({"cost": call["cost"], "seconds": call["seconds"]})
    runs = [json.loads(path.read_text()) for path in sorted((out / RUNS).glob("*.json"))]
    return {
        "name": config.name,
        "seed": config.seed,
        "rows": status.total(),
        **{name: status[name] for name in ("accepted", "rejected", "pending")},
        "reasons": {stage: dict(counts.most_common()) for stage, counts in reasons.items()},
        "sources": {name: dict(counts) for name, counts in sources.items()},
        "stages": {stage: _stage(config, stage, totals[stage], runs) for stage in STAGES},
        "endpoints": {name: _endpoint(config, name, runs) for name in config.endpoints},
        "seconds": sum(run["seconds"] for run in runs),
        "versions": {name: version(name) for name in ("verl_avar", "openai", "pyarrow", "math-verify")},
        "attention": attention,
    }


def _stage(config: DictConfig, stage: str, totals: Counter, runs: list[dict]) -> dict:
    settings = config.stages[stage]
    counts = sum((_counts(run, settings.endpoint, stage) for run in runs), Counter())
    requests, _ = counts.pop("requests", 0), counts.pop("answers", 0)
    return {
        "model": settings.model,
        "endpoint": config.endpoints[settings.endpoint].base_url,
        "prompt": "built in" if settings.prompt is None else Path(settings.prompt).name,
        "prompt_sha256": template_hash(settings.prompt, stage),
        "sampling": OmegaConf.to_container(settings.sampling),
        "candidates": settings.candidates,
        "keep": settings.keep,
        "requests": requests,
        "retries": dict(counts),
        **{name: totals[name] for name in ("calls", "prompt_tokens", "completion_tokens", "cost", "seconds")},
    }


def _endpoint(config: DictConfig, name: str, runs: list[dict]) -> dict:
    """Requests of all runs and the rate that they were sent at, beside the rate that the config states."""
    requests = sum(_counts(run, name, stage)["requests"] for run in runs for stage in STAGES)
    seconds = sum(run["endpoints"].get(name, {"seconds": 0.0})["seconds"] for run in runs)
    return {
        "base_url": config.endpoints[name].base_url,
        "requests": requests,
        "requests_per_minute": 60 * requests / seconds if seconds else None,
        "stated_requests_per_minute": config.endpoints[name].requests_per_minute,
    }


def _counts(run: dict, endpoint: str, stage: str) -> Counter:
    return Counter(run["endpoints"].get(endpoint, {"stages": {}})["stages"].get(stage, {}))


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


@contextmanager
def _stopped_by_signals(progress: Progress) -> Iterator[None]:
    """The first SIGINT or SIGTERM asks the run to end, the next does what it did before."""
    before: dict[int, Callable] = {}

    def ask(number, _frame) -> None:
        progress.stop = progress.stop or SIGNALLED
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
