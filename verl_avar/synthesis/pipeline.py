"""Rows through the stages, many at once: answers from the store where it has them, else from endpoints."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
from omegaconf import DictConfig, OmegaConf

from verl_avar.calls.answer import BAD_REQUEST, Answer
from verl_avar.calls.endpoint import CallFailed, Endpoint, EndpointError, Stopping
from verl_avar.calls.store import CALLS, FAILURES, Lines, Writer, write_whole
from verl_avar.errors import ConfigError
from verl_avar.synthesis.checks import Context, Problem
from verl_avar.synthesis.checks.settings import TextChecks
from verl_avar.synthesis.checks.stages import check
from verl_avar.synthesis.outcomes import PENDING, STAGES
from verl_avar.synthesis.walk import CALL_FAILED, Ask, Unanswered, Walk, prompt, walk

ROWS_FILE, RETRIES_FILE = "rows.parquet", "retries.jsonl"
RUNS = "runs"
READ_AT_ONCE = 64  # rows
RECORD_EVERY_S = 5.0
BUDGET, SIGNALLED = "the budget is spent", "asked to end"


@dataclass
class Spent:
    """What calls took, all runs into the folder together; `over` when the budget is spent."""

    tokens: int = 0
    cost: float = 0.0

    def add(self, call: dict) -> None:
        self.tokens += call["prompt_tokens"] + call["completion_tokens"]
        self.cost += call["cost"]

    def over(self, budget: DictConfig) -> bool:
        tokens, cost = budget.tokens, budget.cost
        return (tokens is not None and self.tokens >= tokens) or (cost is not None and self.cost >= cost)


@dataclass
class Progress:
    """How a run stands; `show` is called after each row."""

    show: Callable[[Progress], None] = lambda progress: None
    rows: Counter = field(default_factory=Counter)  # accepted, rejected, pending
    reasons: Counter = field(default_factory=Counter)
    calls: int = 0  # answered in this run
    spent: Spent = field(default_factory=Spent)
    failure: str | None = None  # the last call that no attempt got an answer to: stage, endpoint, error
    stop: str | None = None  # why no more requests are made: BUDGET, SIGNALLED, or an endpoint's error


def read_rows(path: Path) -> Iterator[dict]:
    """The rows of a parquet file, some at a time."""
    with pq.ParquetFile(path, pre_buffer=False) as file:  # else all of it is held in memory
        for batch in file.iter_batches(batch_size=READ_AT_ONCE):
            yield from batch.to_pylist()


def check_settings_of(config: DictConfig) -> dict[str, TextChecks]:
    """Of each stage, as dataclasses: a config's own access takes longer than many a check."""
    return {stage: OmegaConf.to_object(config.checks[stage]) for stage in STAGES}


def read_attempts(out: Path) -> Callable[[str, str], int]:
    """(row id, stage) -> how often `--retry` sent it again."""
    path, counts = out / RETRIES_FILE, Counter()
    if path.exists():
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            counts[entry["row"], entry["stage"]] += 1
    return lambda row, stage: counts[row, stage]


def run_calls(config: DictConfig, out: Path, rows: Iterable[dict], writer: str, progress: Progress) -> None:
    """Makes every call that the rows need and the store lacks, and keeps OUT/runs/WRITER.json, how it went.

    progress.spent: what the budget is held against, to begin with. A row whose calls fail is passed over, to be tried
    again by the next run. Whatever else goes wrong ends the run: no more requests are made, answers to those in flight
    are kept, then it is raised. That is EndpointError where an endpoint can't be used at all, ConfigError for a prompt
    that a row can't be put into, OSError for a full disk.
    """
    with Lines(out / CALLS) as stored:
        run = _Run(config, out, stored, writer, progress)
        try:
            asyncio.run(run.all(rows))
        finally:
            run.close()


class _Run:
    def __init__(self, config: DictConfig, out: Path, stored: Lines, writer: str, progress: Progress):
        self.config, self.stored, self.progress = config, stored, progress
        self.attempts = read_attempts(out)
        self.calls, self.failures = Writer(out / CALLS, writer), Writer(out / FAILURES, writer)
        self.checker = ThreadPoolExecutor(1)  # math-verify takes its time; requests go on meanwhile
        self.checks = check_settings_of(config)
        self.has_budget = any(config.budget[kind] is not None for kind in config.budget)
        self.error: BaseException | None = None  # the first one
        self.begun: set[str] = set()  # ids of rows, where several rows may have one and the same
        self.record, self.started, self.recorded = out / RUNS / f"{writer}.json", time.time(), 0.0
        self.record.parent.mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        self.checker.shutdown()
        self.calls.close()
        self.failures.close()

    async def all(self, rows: Iterable[dict]) -> None:
        config = self.config
        used = {config.stages[stage].endpoint for stage in STAGES}
        self.endpoints = {name: Endpoint(name, config.endpoints[name], self.may_go) for name in used}
        places = 2 * sum(endpoint.settings.concurrency for endpoint in self.endpoints.values())
        tasks: set[asyncio.Task] = set()
        try:
            for row in rows:
                if not self.may_go():
                    break
                if self.is_repeated(row):
                    continue
                if len(tasks) >= places:
                    ended, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                    self.tell(ended)
                tasks.add(asyncio.create_task(self.row(row)))
            while tasks:
                ended, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                self.tell(ended)
        finally:
            for task in tasks:
                task.cancel()
            for endpoint in self.endpoints.values():
                await endpoint.close()
            self.write_record()
        if self.error:
            raise self.error

    def is_repeated(self, row: dict) -> bool:
        """Whether an earlier row is the same but for its place: its answers are this one's too."""
        if self.config.duplicates.exact:  # intake left those out
            return False
        if row["id"] in self.begun:
            self.progress.rows["repeated"] += 1
            return True
        self.begun.add(row["id"])
        return False

    def fail(self, error: BaseException) -> None:
        self.error = self.error or error
        self.progress.stop = self.progress.stop or str(error)

    def tell(self, ended: Iterable[asyncio.Task]) -> None:
        for task in ended:
            if error := task.exception():
                self.fail(error)
                continue
            done = task.result()
            self.progress.rows[done.status] += 1
            if done.problem:
                self.progress.reasons[done.problem.reason] += 1
                if done.problem.reason == CALL_FAILED:
                    endpoint = self.config.stages[done.stage].endpoint
                    self.progress.failure = f"{done.stage} by endpoint {endpoint}: {done.problem.detail}"
        if time.monotonic() - self.recorded > RECORD_EVERY_S:
            self.write_record()
        self.progress.show(self.progress)

    def write_record(self) -> None:
        """Requests, answers and failed requests of each stage, and each endpoint's span of requests in seconds."""
        self.recorded = time.monotonic()
        endpoints = {
            name: {
                "stages": {stage: dict(counts) for stage, counts in endpoint.counts.items()},
                "seconds": 0.0 if endpoint.first is None else endpoint.last - endpoint.first,
            }
            for name, endpoint in self.endpoints.items()
        }
        record = {"started": self.started, "seconds": time.time() - self.started, "endpoints": endpoints}
        write_whole(self.record, json.dumps(record))

    def may_go(self) -> bool:
        if self.progress.stop is None and self.progress.spent.over(self.config.budget):
            self.progress.stop = BUDGET
        return self.progress.stop is None

    async def row(self, row: dict) -> Walk:
        async def ask(one: Ask) -> dict:
            return self.stored.get(one.key) or await self.call(row, one)

        try:
            return await walk(row, self.config, self.attempts, ask, self.check)
        except ConfigError as error:
            raise ConfigError(f"row {row['source_row']} of {row['source']}: {error}") from None

    async def call(self, row: dict, one: Ask) -> dict:
        settings = self.config.stages[one.stage]
        endpoint = self.endpoints[settings.endpoint]
        about = {"row": row["id"], "stage": one.stage, "candidate": one.candidate, "attempt": one.attempt}
        try:
            images = [image["bytes"] for image in row["images"]] if settings.images else []
            messages = prompt(one.stage, settings, one.context, len(row["images"]), images)
            answer = await endpoint.call(one.stage, one.model, messages, one.sampling, settings.reasoning)
        except CallFailed as error:
            self.failures.add(one.key, about | {"kind": error.kind, "detail": str(error), "time": time.time()})
            raise Unanswered(CALL_FAILED, str(error)) from None
        except Stopping:
            raise Unanswered(PENDING) from None
        except EndpointError as error:
            self.fail(error)
            raise Unanswered(PENDING) from None
        record = about | asdict(answer) | {"cost": cost(answer, settings.price), "time": time.time()}
        self.calls.add(one.key, record)
        self.progress.calls += 1
        self.progress.spent.add(record)
        if self.has_budget and not answer.prompt_tokens and answer.finish != BAD_REQUEST:
            self.fail(EndpointError(f"endpoint {endpoint.name} does not say how many tokens it used: set no budget"))
        return record

    async def check(self, stage: str, text: str, finish: str, context: Context) -> Problem | None:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.checker, check, stage, text, finish, context, self.checks[stage])


def cost(answer: Answer, price: DictConfig) -> float:
    """Of one call, in the currency of the prices."""
    return (answer.prompt_tokens * price.prompt + answer.completion_tokens * price.completion) / 1e6
