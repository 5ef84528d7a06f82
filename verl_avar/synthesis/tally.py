"""summary.json of a run folder: rows by what became of them, calls, tokens, cost, retries and rates."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from verl_avar.calls.answer import BAD_REQUEST
from verl_avar.calls.store import CALLS, Lines
from verl_avar.synthesis.outcomes import STAGES
from verl_avar.synthesis.pipeline import RUNS, read_rows
from verl_avar.synthesis.prompt import template_hash
from verl_avar.synthesis.settle import OUTCOMES_FILE


def summarise(config: DictConfig, out: Path, attention: dict | None) -> dict:
    """Counts of rows by status, reason and source; calls, retries, tokens, cost and latency by stage."""
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
    requests = counts.pop("requests", 0)
    for answered in ("answers", BAD_REQUEST):
        counts.pop(answered, 0)
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
