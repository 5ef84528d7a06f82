"""The figures of a run, drawn by matplotlib; each function returns None where the run did not measure its figures."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from verl_avar.report.drawing import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    TEXT,
    bars,
    bars_height,
    measured,
    panels,
    plain,
    stacked,
)
from verl_avar.report.results import digits, number, title

SMOOTH = 5  # GRPO steps in the running mean


def accuracy(results: dict) -> Figure:
    """Accuracy of each stage over all tasks, beside its control with shuffled images, in %."""
    stages = results["stages"]
    series = [
        ("own image", BLUE, [_percent(number(stage, "accuracy", "all")) for stage in stages]),
        ("shuffled images", GREY, [_percent(number(stage, "shuffled", "all")) for stage in stages]),
    ]
    figure, (axes,) = panels([bars_height(len(stages), len(series))])
    bars(axes, _names(stages), series, lambda value: "–" if value is None else f"{value:.1f}")
    axes.set_xlabel("right answers, %", fontsize=TEXT)
    axes.set_xlim(0, 100)
    return figure


def vas(results: dict) -> Figure | None:
    """VAS of each stage: head-averaged, over the response and the user turn; and the paper's mean on a log axis."""
    stages = results["stages"]
    robust = [
        ("response, mean", BLUE, [number(stage, "vas", "response", "head_mean") for stage in stages]),
        ("response, median", GREEN, [number(stage, "vas", "response", "median") for stage in stages]),
        ("user turn, mean", ORANGE, [number(stage, "vas", "user", "head_mean") for stage in stages]),
    ]
    paper = [
        ("response", BLUE, [number(stage, "vas", "response", "paper") for stage in stages]),
        ("user turn (as published)", ORANGE, [number(stage, "vas", "user", "paper") for stage in stages]),
    ]
    drawn = [series for series in (robust, paper) if any(measured(values) for _, _, values in series)]
    if not drawn:
        return None
    figure, grid = panels([0.2 + bars_height(len(stages), len(series)) for series in drawn])
    for axes, series in zip(grid, drawn, strict=True):
        bars(axes, _names(stages), series, digits)
        if series is paper:
            axes.set_xscale("log")
            axes.set_title("Paper's VAS: mean of the ratios of single heads", fontsize=TEXT, loc="left", pad=28)
            axes.set_xlabel("visual / system mass, log scale", fontsize=TEXT)
        else:
            axes.set_title("VAS after averaging heads", fontsize=TEXT, loc="left", pad=28)
            axes.set_xlabel("visual / system mass", fontsize=TEXT)
        axes.margins(x=0.18)
    return figure


def mass(results: dict) -> Figure | None:
    """How the response's attention divides into image, system turn and the rest, in %."""
    shares = [(number(stage, "mass", "visual"), number(stage, "mass", "system")) for stage in results["stages"]]
    stages = [stage for stage, share in zip(results["stages"], shares, strict=True) if None not in share]
    shares = 100 * np.array([share for share in shares if None not in share], dtype=float)
    if not stages:
        return None
    figure, (axes,) = panels([1.4 + 0.5 * len(stages)])
    parts = [
        ("image", BLUE, shares[:, 0]),
        ("system turn", ORANGE, shares[:, 1]),
        ("the rest", GREY, 100 - shares.sum(1)),
    ]
    stacked(axes, _names(stages), parts)
    axes.set_xlabel("attention of the response's tokens, %", fontsize=TEXT)
    return figure


def rl(results: dict) -> Figure | None:
    """The reward's parts and the visual attention behind them over the GRPO steps: each step, and a running mean."""
    steps = results.get("rl") or []
    kinds = [
        ("accuracy and format", [("acc", "accuracy", BLUE, "-"), ("format", "format", GREEN, "--")]),
        (
            "reward and its visual term",
            [("reward", "reward", BLACK, "-"), ("visual", "visual (counted)", ORANGE, "--")],
        ),
        ("VAS of the rollouts", [("visual_ratio", "image over system turn, right and wrong answers", ORANGE, "-")]),
        ("attention mass", [("visual_mass", "image", BLUE, "-"), ("system_mass", "system turn", ORANGE, "--")]),
    ]
    kinds = [
        (name, drawn)
        for name, lines in kinds
        if (drawn := [line for line in lines if measured([number(row, line[0]) for row in steps])])
    ]
    if not kinds:
        return None
    figure, grid = panels([0.4 / len(kinds) + 2.3] * len(kinds), sharex=True)
    at = [row["step"] for row in steps]
    for axes, (name, lines) in zip(grid, kinds, strict=True):
        for key, label, colour, style in lines:
            values = np.array([np.nan if (value := number(row, key)) is None else value for row in steps])
            axes.plot(at, values, color=colour, alpha=0.3, linewidth=1)
            axes.plot(at, _running_mean(values), color=colour, linestyle=style, linewidth=2.2, label=label)
        axes.set_title(name, fontsize=TEXT, loc="left")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#E5E5E5")
        plain(axes)
        axes.legend(fontsize=TEXT - 2, frameon=False, loc="upper left", bbox_to_anchor=(0, 0.98), ncols=2)
        low, high = axes.get_ylim()
        axes.set_ylim(low, low + 1.3 * (high - low))  # room for the legend
    grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[-1].set_xlabel(f"GRPO step (thin: each step; thick: mean of the last {SMOOTH})", fontsize=TEXT)
    return figure


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean of each step and up to SMOOTH - 1 before it; steps that were not measured do not count."""
    windows = [values[max(0, end - SMOOTH) : end] for end in range(1, len(values) + 1)]
    return np.array([np.nan if np.isnan(window).all() else np.nanmean(window) for window in windows])


def _names(stages: list[dict]) -> list[str]:
    return [title(stage) for stage in stages]


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value
