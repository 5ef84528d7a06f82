"""Models by benchmarks in the paper's layout: figures with intervals, and differences to the re-run base and, marked
as such, to published figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from verl_avar.errors import ConfigError
from verl_avar.evaluation.benchmark.deltas import RESAMPLES, delta, is_clear, percentiles
from verl_avar.evaluation.benchmark.published import TITLES, Row, published_rows
from verl_avar.evaluation.benchmark.runs import Run, all_titles
from verl_avar.evaluation.paired import holm

if TYPE_CHECKING:
    import pandas as pd

AVERAGE = "avg"
# metrics.figures: (results, metrics by benchmark) -> {benchmark: {"main": {"value", "interval"} or None, "questions",
# "rates", "failed", …}}
Figures = Callable[["pd.DataFrame", Mapping[str, str]], Mapping[str, Mapping]]


@dataclass
class Cell:
    """A model on a benchmark; figures are shares, 0 to 1.

    interval: [low, high] at 95 %, or None. delta: to the base, as deltas.delta gives it with `p_holm` and `clear`
    (neither p nor p_holm for the average); None for the base itself. published: {"model", "value", "delta"}.
    asked, questions: how many of the benchmark's questions there are results of. figures: all that the metric says.
    """

    value: float
    interval: list[float] | None
    asked: int
    questions: int
    delta: dict | None = None
    published: dict | None = None
    figures: Mapping = field(default_factory=dict)


@dataclass
class Line:
    """A model's cells by benchmark, with AVERAGE where it is over all; None: not run. missing: titles of those,
    and of benchmarks that were not run to their end. sizes: why benchmarks were not asked as many questions
    as their publisher counts."""

    name: str
    cells: dict[str, Cell | None]
    missing: list[str]
    sizes: list[str] = field(default_factory=list)


@dataclass
class Table:
    """titles: {benchmark: title}, of several AVERAGE last. tests: how many differences p_holm is corrected for."""

    titles: dict[str, str]
    base: str
    lines: list[Line]
    published: list[Row]
    tests: int

    def line(self, name: str) -> Line:
        return next(line for line in self.lines if line.name == name)


def build(
    runs: Sequence[Run],
    base: str | None = None,
    published: Mapping[str, str] | None = None,
    figures: Figures | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Table:
    """The table of these runs, the base first.

    base: name of the run that differences are to, by default the first. published: {run's name: model of
    benchmarks.csv}, whose figures stand below, and to which the run's differences are given. figures: the benchmarks'
    metrics, by default `metrics.figures`. Raises ConfigError for a name that is not there.
    """
    if figures is None:
        from verl_avar.evaluation.benchmark.metrics import figures
    runs = base_first(runs, base)
    titles = all_titles(runs)
    lines = [_line(run, titles, figures) for run in runs]
    tested = []
    for run, line in zip(runs[1:], lines[1:], strict=True):
        for number, name in enumerate(titles):
            if line.cells[name] is not None and lines[0].cells[name] is not None:
                pair = [(plain := one.of())[plain["benchmark"] == name] for one in (run, runs[0])]
                # Benchmarks are drawn independently of each other, for the interval of their average.
                line.cells[name].delta = found = delta(*pair, run.metrics[name], resamples, seed + number)
                if found["pairs"]:
                    tested.append(found)
    for found, p in zip(tested, holm([found["p"] for found in tested]), strict=True):
        found["p_holm"] = p
        found["clear"] = is_clear(found)
    for line in lines:
        line.cells[AVERAGE] = _average(line, list(titles))
    rows = _compared(lines, published or {})
    shown = titles | {AVERAGE: "average"} if len(titles) > 1 else titles
    return Table(shown, runs[0].name, lines, rows, len(tested))


def base_first(runs: Sequence[Run], base: str | None) -> list[Run]:
    """The runs, the base before the others. Raises ConfigError where no run has its name."""
    if base is None:
        return list(runs)
    first = [run for run in runs if run.name == base]
    if not first:
        raise ConfigError(f"base '{base}' is none of the runs: {', '.join(run.name for run in runs)}")
    return [*first, *(run for run in runs if run.name != base)]


def _line(run: Run, titles: Mapping[str, str], figures: Figures) -> Line:
    plain = run.of()
    found = figures(plain, run.metrics) if len(plain) else {}
    cells: dict[str, Cell | None] = {}
    missing, sizes = [], []
    for name, title in titles.items():
        one = found.get(name) if name in run.summary["benchmarks"] else None
        if one is None or one["main"] is None:
            cells[name] = None
            missing.append(title)
            continue
        wanted = run.summary["benchmarks"][name].get("questions") or one["questions"]
        cells[name] = Cell(one["main"]["value"], one["main"]["interval"], one["questions"], wanted, figures=one)
        if one["questions"] < wanted:
            missing.append(f"{title} ({one['questions']} of {wanted} questions)")
        if one["questions"] != wanted:
            sizes.append(_size(run, title, one["questions"], wanted))
    return Line(run.name, cells, missing, sizes)


def _size(run: Run, title: str, asked: int, wanted: int) -> str:
    """Why a benchmark was not asked as many questions as it has: a copy of another size is still a copy."""
    limit, broken = (run.summary.get(key) for key in ("limit", "broken"))
    if limit and asked < wanted:
        return f"{asked:,} of the {wanted:,} questions of {title} were asked (--limit {limit})."
    left_out = f" (broken rows of the suite that were left out: {broken})" if broken and asked < wanted else ""
    return (
        f"its copy of {title} has {asked:,} questions{left_out}, the published benchmark {wanted:,}: "
        "another set, whose figures are not those of the benchmark."
    )


def _average(line: Line, names: Sequence[str]) -> Cell | None:
    """Over all benchmarks, each of them whole; its interval takes them for independent."""
    cells = [line.cells[name] for name in names]
    if line.missing or not cells:
        return None
    value = float(np.mean([cell.value for cell in cells]))
    interval = None
    if all(cell.interval is not None for cell in cells):
        halves = np.array([[cell.value - cell.interval[0], cell.interval[1] - cell.value] for cell in cells])
        below, above = np.sqrt((halves**2).sum(axis=0)) / len(cells)
        interval = [value - float(below), value + float(above)]
    average = Cell(value, interval, sum(c.asked for c in cells), sum(c.questions for c in cells))
    deltas = [cell.delta for cell in cells]
    if all(found is not None and found["pairs"] for found in deltas):
        length = min(len(found["draws"]) for found in deltas)
        draws = np.mean([found["draws"][:length] for found in deltas], axis=0)
        bounds = percentiles(draws)
        average.delta = {
            "pairs": sum(found["pairs"] for found in deltas),
            "value": float(np.mean([found["value"] for found in deltas])),
            "interval": bounds,
            "gained": sum(found["gained"] for found in deltas),
            "lost": sum(found["lost"] for found in deltas),
        }
        average.delta["clear"] = is_clear(average.delta)
    return average


def _compared(lines: Sequence[Line], published: Mapping[str, str]) -> list[Row]:
    """Gives the named lines their difference to published figures; returns the published rows."""
    rows = {row.model: row for row in published_rows()}
    by_name = {line.name: line for line in lines}
    for name, model in published.items():
        if name not in by_name:
            raise ConfigError(f"published: '{name}' is none of the runs: {', '.join(by_name)}")
        if model not in rows:
            raise ConfigError(f"published: no model '{model}' in the paper's table; it has {', '.join(rows)}")
        for benchmark, cell in by_name[name].cells.items():
            value = published_value(rows[model], benchmark)
            # An average is set against the published one only where it is over the paper's own benchmarks.
            if benchmark == AVERAGE and set(by_name[name].cells) - {AVERAGE} != set(TITLES):
                value = None
            if cell is not None and value is not None:
                cell.published = {"model": model, "value": value, "delta": cell.value - value}
    return [rows[model] for model in dict.fromkeys(published.values())]


def published_value(row: Row, benchmark: str) -> float | None:
    """A published figure as a share; the average as it is recomputed from its row."""
    value = row.recomputed if benchmark == AVERAGE else row.figures.get(benchmark)
    return None if value is None else float(value) / 100
