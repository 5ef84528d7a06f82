"""A synthesis run: intake, calls, what became of every row, selection, outputs. Run again, it does what is missing.

OUT/rows.parquet, intake.parquet    rows as every stage reads them, and those that were refused (intake.py)
OUT/calls/, failures/               answered calls, and those that no attempt got an answer to (calls/store.py)
OUT/retries.jsonl                   what `--retry` sent again
OUT/outcomes.parquet                each row of the sources once: accepted, rejected with a reason, or pending
OUT/runs/                           of every run: requests, failed ones by kind, time
OUT/summary.json, README.md, …      outputs
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from verl_avar.calls.endpoint import EndpointError, key_of
from verl_avar.calls.store import CALLS, Lines, locked, remove_parts, write_whole, writer_name
from verl_avar.synthesis.checks.stages import check_settings
from verl_avar.synthesis.intake import intake
from verl_avar.synthesis.outcomes import STAGES
from verl_avar.synthesis.pipeline import BUDGET, ROWS_FILE, SIGNALLED, Progress, Spent, read_rows, run_calls
from verl_avar.synthesis.progress import shown
from verl_avar.synthesis.prompt import check as check_prompt
from verl_avar.synthesis.settle import Pick, check_reasons, send_again, settle, walks
from verl_avar.synthesis.tally import summarise

SUMMARY_FILE = "summary.json"


@dataclass
class Result:
    """How a run ended. stop: why it left rows pending, or None."""

    summary: dict
    stop: str | None
    error: EndpointError | None


def synthesise(
    config: DictConfig, console: Console, retry: Sequence[str] = (), ray: str | None = None, workers: int = 1
) -> Result:
    """Makes what is missing in `config.out`, and its outputs, from whatever is there in the end.

    retry: reasons whose rejected rows are asked again. ray: address of a cluster that the rows are spread over, by
    `workers` processes. Raises ConfigError before anything is sent.
    """
    out = Path(config.out).expanduser().absolute()
    for stage in STAGES:
        check_prompt(config.stages[stage].prompt, stage)
        check_settings(config.checks[stage])
        endpoint = config.stages[stage].endpoint
        key_of(endpoint, config.endpoints[endpoint])
    check_reasons(retry)
    with locked(out):
        remove_parts(out)
        counts = intake(config, out)
        told = ", ".join(f"{count:,} {reason}" for reason, count in counts["reasons"].items())
        console.print(f"intake: {counts['rows']:,} rows, {counts['rejected']:,} left out" + f" ({told})" * bool(told))
        write_whole(out / "config.yaml", OmegaConf.to_yaml(config))
        for reason, count in (send_again(config, out, retry) if retry else {}).items():
            console.print(f"{reason}: {count:,} rows are asked again", highlight=False)
        progress, error = Progress(), None
        with shown(progress, counts["rows"], console):
            try:
                make_calls(config, out, progress, ray, workers)
            except EndpointError as failure:
                error = failure
        return Result(conclude(config, out), progress.stop, error)


def make_calls(config: DictConfig, out: Path, progress: Progress, ray: str | None = None, workers: int = 1) -> None:
    """All calls that are missing, in this process or on a Ray cluster at the address `ray`.

    SIGINT and SIGTERM end it after the requests in flight. Raises EndpointError as `run_calls` does.
    """
    progress.spent = spent(out)
    with _stopped_by_signals(progress):
        if ray is None:
            run_calls(config, out, read_rows(out / ROWS_FILE), writer_name(), progress)
            if progress.failure and not progress.calls:
                raise EndpointError(f"no request was answered; the last, of {progress.failure}")
        else:
            from verl_avar.synthesis.ray_data import run_on_ray

            def told(rows: int) -> None:
                progress.rows["done"] += rows
                progress.show(progress)

            taken = {"spent_tokens": progress.spent.tokens, "spent_cost": progress.spent.cost}
            run_on_ray(
                config, out, run_block, ray, workers, progress=told, stopped=lambda: progress.stop is not None, **taken
            )
            if progress.stop is None and spent(out).over(config.budget):
                progress.stop = BUDGET


def run_block(config: DictConfig, out: Path, rows: list[dict], writer: str) -> dict:
    """The calls of some rows, by one worker of a cluster; returns counts of rows, and what was spent."""
    progress = Progress()
    run_calls(config, out, rows, writer, progress)
    return dict(progress.rows) | {"tokens": progress.spent.tokens, "cost": progress.spent.cost}


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

    settle(config, out, by_attention(config, out) if config.stages.anchor.keep == "attention" else None)
    attention = None
    if config.attention.model is not None:
        from verl_avar.synthesis.attention import apply

        attention = apply(config, out)
    summary = summarise(config, out, attention)
    write_outputs(config, out)
    write_viewer(config, out)
    write_card(config, out, summary)
    write_whole(out / SUMMARY_FILE, json.dumps(summary, indent=1, ensure_ascii=False))
    return summary


def by_attention(config: DictConfig, out: Path) -> Pick:
    """Has the student measure every anchored candidate that passes; picks the one with the most attention."""
    from verl_avar.synthesis.selection import best
    from verl_avar.synthesis.student import Chain, score

    def chain(row: dict, text: str) -> Chain:
        return Chain(config.system, row["question"], [image["bytes"] for image in row["images"]], text)

    student = config.attention
    chains = (chain(row, text) for row, done in walks(config, out) for text in done.choices)
    known = score(student.model, chains, out, batch_size=student.batch_size, device=student.device)

    def pick(row: dict, texts: Sequence[str]) -> str:
        return texts[best([(text, known.shares.get(chain(row, text).key)) for text in texts])]

    return pick


@contextmanager
def _stopped_by_signals(progress: Progress) -> Iterator[None]:
    """The first SIGINT or SIGTERM asks the run to end, the next does what it did before."""
    before: dict[int, Callable] = {}

    def ask(number, _frame) -> None:
        progress.stop = progress.stop or SIGNALLED
        os.write(2, b"ending after the requests in flight; once more ends at once\n")  # print may be under way
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
