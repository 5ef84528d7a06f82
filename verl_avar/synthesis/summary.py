"""What a run prints at its end: rows, stages, reasons, what that means, where things lie and what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from verl_avar.report.synthesis_verdicts import losses, percent, retryable, rows_of, verdicts
from verl_avar.synthesis.card import shown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Of a run's folder, in the order in which a person wants them.
FILES = {
    "viewer/index.html": "samples to look at, in a browser",
    "README.md": "the data set's card, with figures",
    "sft.parquet": "rows for verl's supervised fine-tuning",
    "rl.parquet": "prompts for verl's reinforcement learning",
    "sharegpt": "rows for LLaMA-Factory",
    "dataset": "rows for datasets.load_dataset",
    "rejected.jsonl": "rejected rows with their reasons and texts",
}


def print_summary(
    summary: dict,
    console: Console,
    out: Path | str | None = None,
    command: str = "avar synth run config.yaml",
    explain: Mapping[str, str] | None = None,
) -> None:
    """Prints summary.json for a person.

    out: the run's folder, of whose files those that are there are named; None: no file is named. command: what started
    the run, for the lines that say how to go on. explain: what the reason codes mean; by default the checks' REASONS.
    """
    from verl_avar.synthesis.viewer import explanations

    for table in (
        rows_table(summary),
        stages_table(summary, console.width),
        reasons_table(summary, explanations(explain)),
    ):
        if table.row_count:
            console.print(table)
            console.print()
    for line in verdicts(summary) + list((summary.get("attention") or {}).get("notes", [])):
        console.print(f"• {line}", highlight=False, markup=False)
    places = [(Path(out) / name, what) for name, what in FILES.items() if (Path(out) / name).exists()] if out else []
    for title, lines in (
        ("Where things lie", [f"{path}  {what}" for path, what in places]),
        ("What to do next", next_steps(summary, command)),
    ):
        if lines:
            console.print(f"\n{title}", style="bold")
        for line in lines:
            console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


def rows_table(summary: dict) -> Table:
    """Rows and accepted ones, of each source and in all."""
    from rich.table import Table

    table = Table(title=f"Rows of {_literal(summary['name'])}", title_justify="left")
    table.add_column("source")
    for name in ("rows", "accepted", "%"):
        table.add_column(name, justify="right")
    for name, part in summary["sources"].items():
        share = percent(part["accepted"], part["rows"])
        table.add_row(_literal(name), f"{part['rows']:,}", f"{part['accepted']:,}", share.removesuffix(" %"))
    table.add_section()
    if len(summary["sources"]) > 1:
        share = percent(summary["accepted"], summary["rows"]).removesuffix(" %")
        table.add_row("all", f"{summary['rows']:,}", f"{summary['accepted']:,}", share)
    return table


def stages_table(summary: dict, width: int) -> Table:
    """A stage a line on a wide terminal, else a stage a column."""
    from rich.table import Table

    heads = [
        "",
        "model",
        "at",
        "calls",
        "failed requests",
        "prompt tokens",
        "completion tokens",
        "cost",
        "seconds a call",
    ]
    lines = [stage_line(name, part) for name, part in summary["stages"].items()]
    if not any(part["cost"] for part in summary["stages"].values()):
        heads.pop(7)
        for line in lines:
            line.pop(7)
    table = Table(title="Stages", title_justify="left")
    across = width >= 140
    if not across:  # a terminal of 80 columns holds three stages side by side, not nine figures
        heads, *lines = (list(line) for line in zip(heads, *lines, strict=True))
    for index, head in enumerate(heads):
        text = index < 3 if across else index == 0
        table.add_column(head, justify="left" if text else "right", overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table


def stage_line(name: str, part: dict) -> list[str]:
    """Cells of one stage. Seconds are a mean over answered calls."""
    kinds = [f"{count:,} {kind}" for kind, count in sorted(part["retries"].items(), key=lambda one: -one[1]) if count]
    return [
        name,
        _literal(shown(part["model"])),
        _literal(urlsplit(part["endpoint"]).netloc.rpartition("@")[2]),
        f"{part['calls']:,}",
        _literal(", ".join(kinds) or "0"),
        f"{part['prompt_tokens']:,}",
        f"{part['completion_tokens']:,}",
        f"{part['cost']:,.2f}",
        f"{part['seconds'] / part['calls']:.1f}" if part["calls"] else "–",
    ]


def reasons_table(summary: dict, explain: Mapping[str, str]) -> Table:
    """Why rows were rejected, the most frequent reason first."""
    from rich.table import Table

    table = Table(title="Rejected rows", title_justify="left")
    table.add_column("stage: reason", no_wrap=True)
    table.add_column("rows", justify="right")
    table.add_column("of all", justify="right")
    table.add_column("that is")
    for stage, reason, rows in losses(summary):
        share = percent(rows, summary["rows"])
        table.add_row(_literal(f"{stage}: {reason}"), f"{rows:,}", share, _literal(explain.get(reason, "")))
    return table


def next_steps(summary: dict, command: str) -> list[str]:
    """Commands that would bring more rows, and what to look at first."""
    steps = []
    failed = sum(part.get("call_failed", 0) for part in summary["reasons"].values())
    again = [f"the {rows_of(summary['pending'])} not finished"] * bool(summary["pending"])
    again += [f"the {rows_of(failed)} whose calls failed"] * bool(failed)
    if again:
        steps.append(f"{command}   goes on with {' and '.join(again)}")
    for stage, reason, rows in losses(summary)[:3]:
        if retryable(stage, reason):
            which = reason if sum(reason in part for part in summary["reasons"].values()) == 1 else f"{stage}:{reason}"
            steps.append(f"{command} --retry {which}   asks {stage} again for {rows_of(rows)}")
    if summary["accepted"]:
        steps.append("look at the samples before training: checks don't read a chain, they compare answers and wording")
    return steps


def _literal(text: str) -> str:
    """Text in which rich finds no markup."""
    from rich.markup import escape

    return escape(str(text))
