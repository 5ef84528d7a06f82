"""After the calls: what became of every row of the sources, from stored answers alone, each row exactly once."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import DictConfig

from verl_avar.calls.store import CALLS, FAILURES, Lines, write_whole
from verl_avar.errors import ConfigError
from verl_avar.synthesis.checks import Problem
from verl_avar.synthesis.checks.reasons import INTAKE_REASONS, REASONS, STAGE_REASONS
from verl_avar.synthesis.checks.stages import check, find_anchors
from verl_avar.synthesis.outcomes import OUTCOMES, PENDING, REJECTED, STAGES
from verl_avar.synthesis.pipeline import RETRIES_FILE, ROWS_FILE, check_settings_of, read_attempts, read_rows
from verl_avar.synthesis.walk import CALL_FAILED, Ask, Unanswered, Walk, walk

OUTCOMES_FILE, INTAKE_FILE = "outcomes.parquet", "intake.parquet"
WRITTEN_AT_ONCE = 256  # rows


Pick = Callable[[dict, Sequence[str]], str]  # (row of rows.parquet, its anchored candidates that pass) -> the one kept


def settle(config: DictConfig, out: Path, pick: Pick | None = None) -> Path:
    """Writes OUT/outcomes.parquet (schema outcomes.OUTCOMES), in the order of the sources; returns its path.

    pick: decides where `stages.anchor.keep` is attention; None: the first candidate.
    """
    path, part = out / OUTCOMES_FILE, out / f".{OUTCOMES_FILE}.{os.getpid()}"
    try:
        with pq.ParquetWriter(part, OUTCOMES) as writer:
            outcomes = walked(config, out, pick)
            while rows := list(itertools.islice(outcomes, WRITTEN_AT_ONCE)):
                writer.write_table(pa.Table.from_pylist(rows, schema=OUTCOMES))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def walked(config: DictConfig, out: Path, pick: Pick | None = None) -> Iterator[dict]:
    """A row of OUTCOMES for every row of the sources."""
    names = source_order(out)

    def place(row: dict) -> tuple[int, int]:
        return names.index(row["source"]), row["source_row"]

    def through() -> Iterator[dict]:
        for row, done in walks(config, out):
            if pick and len(done.choices) > 1:
                done.texts["anchor"] = pick(row, done.choices)
            yield outcome(row, done)

    def refused() -> Iterator[dict]:
        for row in read_rows(out / INTAKE_FILE):
            yield outcome(row, Walk(REJECTED, "intake", Problem(row["reason"], row["detail"])))

    yield from heapq.merge(through(), refused(), key=place)


def walks(config: DictConfig, out: Path) -> Iterator[tuple[dict, Walk]]:
    """(row of rows.parquet, how far stored answers take it)."""
    attempts, checks = read_attempts(out), check_settings_of(config)
    loop = asyncio.new_event_loop()
    with Lines(out / CALLS) as stored, Lines(out / FAILURES) as failed, closing(loop):

        async def ask(one: Ask) -> dict:
            if call := stored.get(one.key):
                return call
            if failure := failed.get(one.key):
                raise Unanswered(CALL_FAILED, failure["detail"])
            raise Unanswered(PENDING)

        async def checked(stage: str, *arguments) -> Problem | None:
            return check(stage, *arguments, checks[stage])

        for row in read_rows(out / ROWS_FILE):
            yield row, loop.run_until_complete(walk(row, config, attempts, ask, checked))


def source_order(out: Path) -> list[str]:
    """Names of the sources, as intake read them."""
    return list(json.loads((out / "intake.json").read_text())["sources"])


def outcome(row: dict, done: Walk) -> dict:
    anchored = done.texts.get("anchor")
    anchors = [{"text": a.text, "position": a.position} for a in find_anchors(anchored)] if anchored else []
    columns = {name: row[name] for name in ("id", "source", "source_row")} | done.columns()
    return columns | {"anchors": anchors, "attention": None, "weight": 1.0}


def check_reasons(reasons: Iterable[str]) -> None:
    """Raises ConfigError for a `--retry` that no call can help: unknown, or a reason of where no model is asked."""
    for given in reasons:
        stage, _, code = given.rpartition(":")
        if code not in REASONS:
            raise ConfigError(f"--retry {given}: unknown reason '{code}'; known are {', '.join(STAGE_REASONS)}")
        if code in INTAKE_REASONS:
            how = "change the source, or `duplicates` and `overlap`"
            raise ConfigError(f"--retry {given}: {code} is a reason of the intake, which asks no model; {how}")
        if code not in STAGE_REASONS:
            raise ConfigError(f"--retry {given}: {code} is the selection's, which asks no model; change attention.keep")
        if stage and stage not in STAGES:
            raise ConfigError(f"--retry {given}: unknown stage '{stage}'; stages are {', '.join(STAGES)}")


def send_again(config: DictConfig, out: Path, wanted: Iterable[str]) -> dict[str, int]:
    """Has the stage asked again that rejected a row for one of these reasons; returns how many rows by reason.

    What was marked before and not answered since is not marked twice; call_failed needs no mark, for every run makes
    such calls again. wanted: reason codes of stages, or STAGE:REASON (`check_reasons`).
    """
    counts = dict.fromkeys(wanted, 0)
    marked = {}  # by row and stage: rows may have the same id
    for row in walked(config, out):
        stage, code = row["stage"], row["reason"]
        if row["status"] != REJECTED or stage not in STAGES:
            continue
        if reason := next((one for one in counts if one in (code, f"{stage}:{code}")), None):
            counts[reason] += 1
            if code != CALL_FAILED:
                marked[row["id"], stage] = {"row": row["id"], "stage": stage, "reason": code, "time": time.time()}
    path = out / RETRIES_FILE
    before = path.read_text() if path.exists() else ""
    write_whole(path, before + "".join(json.dumps(line) + "\n" for line in marked.values()))
    return counts
