"""Figures of benchmark runs, drawn by matplotlib; each returns None where the runs lack what it shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from verl_avar.evaluation.benchmark import diagnostics
from verl_avar.report.drawing import BLACK, BLUE, GREY, ORANGE, SERIES, TEXT, legend, literal, panels, plain
from verl_avar.report.eval_doses import bias, blackout, columns, short

if TYPE_CHECKING:
    from verl_avar.evaluation.benchmark.runs import Run
    from verl_avar.evaluation.benchmark.table import Table

CONTROLS = {"no_image": "no image", "grey_image": "grey image", "other_image": "another's image",
            "blackout": "part blacked out"}  # fmt: skip
MODELS = 4  # panels of single models in a figure


def figures(runs: Sequence[Run], table: Table, guesses: Mapping[str, float] | None = None) -> dict[str, Figure | None]:
    """By file name without its ending. guesses: {run's name: share that blind guessing gets right}."""
    titles = {name: literal(title) for name, title in table.titles.items()}
    return {
        "scores": scores(table),
        "vas_benchmarks": vas_benchmarks(runs, table),
        "vas_samples": vas_samples(runs, titles),
        "vas_quintiles": vas_quintiles(runs),
        "controls": controls(runs, titles),
        "blackout": blackout(runs, guesses or {}),
        "bias": bias(runs),
        "along": along(runs),
    }


def scores(table: Table) -> Figure:
    """Each model's figure on each benchmark with its 95 % interval."""
    count = len(table.lines)
    titles = {name: title for name, title in table.titles.items() if any(line.cells[name] for line in table.lines)}
    figure, (axes,) = panels([1.5 + len(titles) * (0.3 + 0.17 * count)])
    for index, line in enumerate(table.lines):
        colour, _, mark = SERIES[index % len(SERIES)]
        offset = (index - (count - 1) / 2) * 0.7 / count
        label = short(line.name)
        for row, name in enumerate(titles):
            if (cell := line.cells[name]) is not None:
                if cell.interval is not None:
                    ends = [100 * end for end in cell.interval]
                    axes.plot(ends, [row + offset] * 2, color=colour, linewidth=2, solid_capstyle="butt")
                axes.plot(100 * cell.value, row + offset, mark, color=colour, markersize=7, label=label)
                label = None
    _benchmark_rows(axes, [literal(title) for title in titles.values()])
    axes.set_xlabel("figure of the benchmark, %", fontsize=TEXT)
    legend(axes, columns([line.name for line in table.lines]))
    return figure


def vas_benchmarks(runs: Sequence[Run], table: Table) -> Figure | None:
    """Mean VAS of the responses and the figure, by benchmark; a line joins the models on one benchmark."""
    points = {}
    for index, run in enumerate(runs):
        means = diagnostics.measured(run).groupby("benchmark")["vas"].mean()
        for name, vas in means.items():
            if (cell := table.line(run.name).cells[name]) is not None:
                points.setdefault(name, []).append((float(vas), 100 * cell.value, index))
    if not points:
        return None
    figure, (axes,) = panels([5.0])
    labelled = set()
    for ends in points.values():
        axes.plot([x for x, *_ in ends], [y for _, y, _ in ends], color=GREY, linewidth=1.2, zorder=1)
        for x, y, index in ends:
            colour, _, mark = SERIES[index % len(SERIES)]
            label = None if index in labelled else short(runs[index].name)
            labelled.add(index)
            axes.plot(x, y, mark, color=colour, markersize=7, label=label, zorder=2)
    ends = sorted((max(found)[1], max(found)[0], name) for name, found in points.items())
    apart = 0.055 * (max(y for y, *_ in ends) - min(y for found in points.values() for _, y, _ in found))
    place = -np.inf
    for y, x, name in ends:  # names of points that are near each other stand one above the other
        place = max(y, place + apart)
        axes.annotate("   " + literal(table.titles[name]), (x, y), (x, place), va="center", fontsize=TEXT - 2)
    axes.margins(x=0.2, y=0.08)
    axes.set_xlabel("VAS of the responses, mean", fontsize=TEXT)
    axes.set_ylabel("figure of the benchmark, %", fontsize=TEXT)
    axes.grid(color="#EFEFEF")
    axes.set_axisbelow(True)
    plain(axes)
    legend(axes, columns([runs[index].name for index in labelled]))
    return figure


def vas_samples(runs: Sequence[Run], titles: Mapping[str, str]) -> Figure | None:
    """VAS of right and of wrong answers, median and middle half, by benchmark."""
    shown = [(run, found) for run in runs if (found := diagnostics.right_and_wrong(diagnostics.measured(run)))]
    if not shown:
        return None
    shown = shown[:MODELS]
    figure, grid = panels([1.6 + 0.5 * len(found) for _, found in shown], sharex=True)
    for axes, (run, found) in zip(grid, shown, strict=True):
        names = [name for name in titles if name in found]
        for kind, colour, mark, offset in (("right", BLUE, "o", -0.17), ("wrong", ORANGE, "s", 0.17)):
            for row, name in enumerate(names):
                low, middle, high = found[name][kind]
                axes.plot([low, high], [row + offset] * 2, color=colour, linewidth=2.5, solid_capstyle="butt")
                axes.plot(middle, row + offset, mark, color=colour, markersize=7,
                          label=f"{kind} answers" if row == 0 else None)  # fmt: skip
        _benchmark_rows(axes, [titles[name] for name in names])
        axes.set_title(short(run.name), fontsize=TEXT, loc="left", pad=26)
        legend(axes, 2)
    grid[-1].set_xlabel("VAS of the response: median, middle half", fontsize=TEXT)
    return figure


def vas_quintiles(runs: Sequence[Run]) -> Figure | None:
    """Accuracy by fifth of the answers by VAS; below, the last model's shorter and longer responses by themselves."""
    known = [(run, answers) for run in runs if len(answers := diagnostics.measured(run)) >= 2 * diagnostics.PARTS]
    if not known:
        return None
    figure, grid = panels([3.4, 3.2], sharex=True)
    for index, (run, answers) in enumerate(known):
        _parts(grid[0], diagnostics.by_part(answers), SERIES[index % len(SERIES)], short(run.name), index)
    run, answers = known[-1]
    for index, (half, label) in enumerate(
        zip(diagnostics.halves(answers), ("shorter half", "longer half"), strict=True)
    ):
        _parts(grid[1], diagnostics.by_part(half), SERIES[2 + index], label, index)
    legend(grid[0], columns([run.name for run, _ in known]))
    grid[1].set_title(f"{short(run.name)}, by length of the response", fontsize=TEXT, loc="left", pad=26)
    legend(grid[1], 2)
    for axes in grid:
        axes.set_ylabel("right answers, %", fontsize=TEXT)
    places = range(diagnostics.PARTS)
    grid[1].set_xticks(places, ["looks\nleast", *(str(n + 1) for n in places[1:-1]), "looks\nmost"])
    grid[1].set_xlabel("fifth of the answers to a benchmark, by VAS", fontsize=TEXT)
    return figure


def controls(runs: Sequence[Run], titles: Mapping[str, str]) -> Figure | None:
    """Right answers to the plain questions and under each control, by benchmark."""
    shown = [(run, names) for run in runs if (names := diagnostics.controls_of(run))][:MODELS]
    if not shown:
        return None
    found = [(run, {name: diagnostics.beside_plain(run, name, resamples=1) for name in names}) for run, names in shown]
    rows = [[name for name in titles if any(name in one for one in by.values())] for _, by in found]
    figure, grid = panels([1.7 + 0.45 * len(names) for names in rows], sharex=True)
    for axes, (run, by), names in zip(grid, found, rows, strict=True):
        for index, (control, one) in enumerate(by.items()):
            colour, _, mark = SERIES[1 + index]
            at = [row for row, name in enumerate(names) if name in one]
            values = [100 * one[names[row]]["value"] for row in at]
            axes.plot(values, at, mark, color=colour, markersize=8, label=CONTROLS[control], zorder=2)
        for row, name in enumerate(names):
            base = 100 * next(one[name]["plain"] for one in by.values() if name in one)
            lowest = min(100 * one[name]["value"] for one in by.values() if name in one)
            axes.plot([lowest, base], [row, row], color=GREY, linewidth=1.2, zorder=1)
            axes.plot(base, row, "o", color=BLUE, markersize=8, label="plain" if row == 0 else None, zorder=3)
        _benchmark_rows(axes, [titles[name] for name in names])
        axes.set_title(short(run.name), fontsize=TEXT, loc="left", pad=46 if len(by) > 2 else 26)
        legend(axes, 3)
    grid[-1].set_xlabel("right answers, %", fontsize=TEXT)
    return figure


def along(runs: Sequence[Run]) -> Figure | None:
    """Attention to the image over attention to the system turn along the responses, in equal parts of their length."""
    known = [(run, found) for run in runs if (found := diagnostics.along(run)) is not None]
    if not known:
        return None
    figure, (axes,) = panels([3.6])
    places = (np.arange(diagnostics.BINS) + 0.5) * 100 / diagnostics.BINS
    for index, (run, (values, count)) in enumerate(known):
        colour, dash, mark = SERIES[index % len(SERIES)]
        axes.plot(places, values, dash, color=colour, marker=mark, markersize=5, linewidth=2,
                  label=f"{short(run.name)} ({count:,})")  # fmt: skip
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("place in the response, % of its length", fontsize=TEXT)
    axes.set_ylabel("image / system turn", fontsize=TEXT)
    axes.grid(axis="y", color="#EFEFEF")
    axes.set_axisbelow(True)
    plain(axes)
    legend(axes, columns([f"{run.name} (1,000)" for run, _ in known]))
    return figure


def _parts(axes: Axes, parts: Sequence[dict | None], style: tuple, label: str, index: int) -> None:
    colour, dash, mark = style
    at = [number for number, part in enumerate(parts) if part is not None]
    shift = 0.06 * index  # intervals beside each other
    axes.plot([n + shift for n in at], [100 * parts[n]["value"] for n in at], dash, marker=mark, color=colour,
              linewidth=2, markersize=6, label=label)  # fmt: skip
    for n in at:
        axes.plot([n + shift] * 2, [100 * end for end in parts[n]["interval"]], color=colour, linewidth=1.4)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="y", color="#EFEFEF")
    axes.set_axisbelow(True)
    plain(axes)


def _benchmark_rows(axes: Axes, titles: Sequence[str]) -> None:
    axes.set_yticks(range(len(titles)), titles, fontsize=TEXT - 1)
    axes.set_ylim(len(titles) - 0.4, -0.6)
    axes.grid(axis="y", color="#EFEFEF")
    axes.set_axisbelow(True)
    axes.spines["left"].set_color(BLACK)
    plain(axes)
