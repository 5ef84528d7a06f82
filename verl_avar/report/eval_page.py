"""The report of benchmark runs: OUT/index.html, one page that needs no network; tables and figures beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from verl_avar.evaluation.benchmark import diagnostics
from verl_avar.evaluation.benchmark.runs import Run
from verl_avar.evaluation.benchmark.table import Cell, base_first, build, published_value
from verl_avar.evaluation.benchmark.table_files import between, components, notes, p_text, points, write_table
from verl_avar.report.eval_verdicts import verdicts
from verl_avar.report.sample_pages import scripted

if TYPE_CHECKING:
    from verl_avar.evaluation.benchmark.table import Figures

PROBLEMS = ("truncated", "format", "no_answer", "several_answers", "contradiction")
# Without it the tables stand as they are; with it a click on a head sorts by that column, and back.
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === (column ? "descending" : "ascending") ? -1 : 1;
      const key = row => row.cells[column].dataset.value ?? "";
      const order = (a, b) => column
        ? (key(a) === "") - (key(b) === "") || down * (key(b) - key(a))
        : down * key(a).localeCompare(key(b));
      body.append(...[...body.rows].sort(order));
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", (down > 0) === (column > 0) ? "descending" : "ascending");
    });
  });
}
"""


def render_eval(
    runs: Sequence[Run],
    out: Path,
    base: str | None = None,
    published: Mapping[str, str] | None = None,
    figures: Figures | None = None,
) -> Path:
    """Writes out/index.html, table.md, table.tex, table.csv and figures/*.png; returns the page's path.

    Arguments as of `table.build`, whose ConfigError it raises before anything is written.
    """
    from verl_avar.report import eval_figures
    from verl_avar.report.pages import save_figures, write_page

    table = build(runs, base, published, figures)
    runs, out = base_first(runs, base), Path(out)
    write_table(table, out)
    folder = out / "figures"
    for stale in folder.glob("*.png"):
        stale.unlink()
    guesses = {run.name: guess for run in runs if (guess := _guess(run)) is not None}
    embedded = save_figures(eval_figures.figures(runs, table, guesses), folder)
    return write_page(
        "eval_page.html",
        out / "index.html",
        suite=", ".join(dict.fromkeys(str(run.summary.get("suite")) for run in runs)),
        verdicts=verdicts(runs, table, guesses),
        notes=notes(table),
        titles=table.titles,
        rows=[[_shown(line.cells[name]) for name in table.titles] for line in table.lines],
        names=[line.name for line in table.lines],
        published=[(row.model, [_plain(published_value(row, name)) for name in table.titles])
                   for row in table.published],
        parts=[(line.name, table.titles[name], parts) for line in table.lines for name, cell in line.cells.items()
               if cell is not None and len(parts := _components(cell)) > 1],
        figures=embedded,
        controls=[line for run in runs for line in _controls(run)],
        problems=[line for run in runs for line in _problems(run)],
        problem_names=[name.replace("_", " ") for name in PROBLEMS],
        short=_too_short(runs),
        settings=[(run.name, _settings(run)) for run in runs],
        **scripted(SCRIPT),
    )  # fmt: skip


def _plain(share: float | None) -> tuple[str, float | None]:
    return ("–", None) if share is None else (points(share), share)


def _shown(cell: Cell | None) -> dict:
    """What the page says of a cell."""
    if cell is None:
        return {"value": None}
    shown = {"value": cell.value, "text": points(cell.value), "interval": between(cell.interval)}
    delta = cell.delta if cell.delta and cell.delta["pairs"] else None
    if delta:
        shown |= {"delta": points(delta["value"], True), "ends": between(delta["interval"], True)}
        shown |= {"beyond": delta["clear"], "p": f"p {p_text(delta['p_holm'])}" if "p_holm" in delta else None}
        shown |= {"changed": f"{delta['gained']} gained, {delta['lost']} lost"}
    if cell.published:
        shown["published"] = f"{points(cell.published['delta'], True)} to published†"
    return shown


def _components(cell: Cell) -> list[tuple[str, str, str]]:
    """(name, figure, interval) of what a figure is made of."""
    return [(name, points(one["value"]), between(one["interval"])) for name, one in components(cell.figures)]


def _controls(run: Run) -> list[dict]:
    """A line per benchmark and one for all: right answers plain and under each control."""
    # Its intervals are not shown.
    found = {name: diagnostics.beside_plain(run, name, resamples=1) for name in diagnostics.controls_of(run)}
    lines = []
    both = [(diagnostics.ALL, "all questions")] if len(run.titles) > 1 else []
    for name, title in [*run.titles.items(), *both]:
        known = [one[name] for one in found.values() if name in one]
        if known:
            cells = [found[c][name]["value"] if name in found.get(c, {}) else None for c in diagnostics.CONTROLS]
            lines.append({"model": run.name, "title": title, "questions": max(one["pairs"] for one in known),
                          "cells": [_plain(share) for share in (known[0]["plain"], *cells)]})  # fmt: skip
    return lines


def _too_short(runs: Sequence[Run]) -> bool:
    """Whether attention was asked for token by token, but no response is long enough to be divided."""
    asked = any(run.of()["attention_tokens"].notna().any() for run in runs)
    return asked and all(diagnostics.along(run) is None for run in runs)


def _problems(run: Run) -> list[dict]:
    """A line per benchmark: calls, those that failed, mean tokens, and shares of answers by problem."""
    lines, plain = [], run.of()
    for name, title in run.titles.items():
        part = plain[plain["benchmark"] == name]
        if not len(part):
            continue
        answered = part[part["right"].notna()]
        tokens = answered["completion_tokens"].mean()
        shares = [float((answered["problem"] == problem).mean()) if len(answered) else None for problem in PROBLEMS]
        lines.append({"model": run.name, "title": title, "calls": len(part), "failed": len(part) - len(answered),
                      "tokens": "–" if tokens != tokens else f"{tokens:,.0f}",
                      "cells": [_plain(share) for share in shares]})  # fmt: skip
    return lines


def _guess(run: Run) -> float | None:
    """What blind guessing gets right of the questions whose image was taken away or blacked out."""
    import pyarrow.parquet as pq

    path = run.folder / "questions.parquet"
    asked = run.results[run.results["condition"].str.match("no_image$|blackout")]
    if not len(asked) or not path.is_file():
        return None
    known = pq.read_table(path, columns=["benchmark", "id", "choices", "answer_type"]).to_pylist()
    wanted = set(zip(asked["benchmark"], asked["id"], strict=True))
    return diagnostics.guessing([one for one in known if (one["benchmark"], one["id"]) in wanted])


def _settings(run: Run) -> dict[str, str]:
    """The summary for the page's foot, without what the table says."""
    shown = {name: value for name, value in run.summary.items() if name not in ("name", "benchmarks")}
    shown["benchmarks"] = ", ".join(
        f"{about.get('title', name)} ({about.get('questions', '?')} questions, {about.get('metric', '?')})"
        for name, about in run.summary["benchmarks"].items()
    )
    return {name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for name, value in shown.items() if value is not None}  # fmt: skip
