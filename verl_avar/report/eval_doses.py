"""Curves of benchmark runs over a dose: the bias of attention, and how much of the image is black."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from verl_avar.evaluation.benchmark import diagnostics
from verl_avar.report.drawing import BLACK, GREY, SERIES, TEXT, legend, literal, panels, plain

if TYPE_CHECKING:
    from verl_avar.evaluation.benchmark.runs import Run

NAME = 22  # characters of a model's name in a legend
LEGEND = 64  # characters of a legend's line, marks included
APART = 0.009  # of the axis, between models' intervals, so that they stand beside each other
BLIND = 118  # where "no image" stands on the axis of shares


def bias(runs: Sequence[Run]) -> Figure | None:
    """Change of accuracy by the visual bias β at inference, on the same questions, with 95 % intervals."""
    known = [(run, points) for run in runs if (points := diagnostics.bias_points(run))]
    if not known:
        return None
    figure, (axes,) = panels([3.8])
    axes.axhline(0, color=GREY, linewidth=1.2, linestyle="--", zorder=0)
    betas = [beta for _, points in known for beta, _ in points]
    span = max(betas) - min(betas)
    for index, (run, points) in enumerate(known):
        colour, dash, mark = SERIES[index % len(SERIES)]
        shift = APART * span * (index - (len(known) - 1) / 2)
        places = [beta + shift for beta, _ in points]
        axes.plot(places, [100 * one["difference"] for _, one in points], dash, marker=mark, color=colour, linewidth=2,
                  markersize=7, label=short(run.name))  # fmt: skip
        for beta, one in points:
            if one["interval"] is not None:
                axes.plot([beta + shift] * 2, [100 * end for end in one["interval"]], color=colour, linewidth=1.6)
    axes.set_xlabel("visual bias β", fontsize=TEXT)
    axes.set_ylabel("right answers, points", fontsize=TEXT)
    axes.grid(axis="y", color="#EFEFEF")
    axes.set_axisbelow(True)
    plain(axes)
    legend(axes, columns([run.name for run, _ in known]))
    return figure


def blackout(runs: Sequence[Run], guesses: Mapping[str, float]) -> Figure | None:
    """Right answers by the share of the image that is black, with 95 % intervals; apart, those without any image.

    guesses: {run's name: share that blind guessing gets right of the same questions}, a line.
    """
    known = [(run, points) for run in runs if (points := diagnostics.blackout_points(run))]
    if not known:
        return None
    figure, (axes,) = panels([4.0])
    blind = False
    for index, (run, points) in enumerate(known):
        colour, dash, mark = SERIES[index % len(SERIES)]
        shift = 100 * APART * (index - (len(known) - 1) / 2)
        places = [100 * share + shift for share, _ in points]
        axes.plot(places, [100 * one["value"] for _, one in points], dash, marker=mark, color=colour, linewidth=2,
                  markersize=7, label=short(run.name))  # fmt: skip
        ends = [(place, one["own"]) for place, (_, one) in zip(places, points, strict=True)]
        without = diagnostics.beside_plain(run, "no_image", resamples=1).get(diagnostics.ALL)
        if without is not None:
            blind = True
            axes.plot(BLIND + shift, 100 * without["value"], mark, color=colour, markersize=7)
            ends.append((BLIND + shift, diagnostics.own_interval(run, "no_image")))
        for place, interval in ends:
            if interval is not None:
                axes.plot([place, place], [100 * end for end in interval], color=colour, linewidth=1.6)
    guessed = sorted({guesses[run.name] for run, _ in known if run.name in guesses})
    for number, guess in enumerate(guessed):
        label = None if number else "blind guessing"
        axes.axhline(100 * guess, color=BLACK, linewidth=1.4, linestyle=":", zorder=0, label=label)
    shares = sorted({100 * share for _, points in known for share, _ in points})
    ticks, names = shares, [f"{share:g}" for share in shares]
    if blind:
        ticks, names = [*shares, BLIND], [*names, "no\nimage"]
    axes.set_xticks(ticks, names)
    axes.set_ylim(bottom=-0.03 * axes.get_ylim()[1])  # marks and lines at 0 are whole
    axes.set_xlabel("part of the image that is black, %", fontsize=TEXT)
    axes.set_ylabel("right answers, %", fontsize=TEXT)
    axes.grid(axis="y", color="#EFEFEF")
    axes.set_axisbelow(True)
    plain(axes)
    legend(axes, columns([*(run.name for run, _ in known), *(["blind guessing"] if guessed else [])]))
    return figure


def short(name: str) -> str:
    """A model's name for a legend: checkpoints often differ at the end only."""
    return literal(name if len(name) <= NAME else f"{name[: NAME // 2 - 1]}…{name[-NAME // 2 :]}")


def columns(names: Sequence[str]) -> int:
    """Columns that a legend of these names has room for."""
    widest = max(len(short(name)) for name in names)
    return max(1, min(len(names), LEGEND // (widest + 6)))
