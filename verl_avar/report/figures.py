"""The figures of a run, drawn by matplotlib; each function returns None where the run did not measure its figures.

Colours are from Okabe and Ito's set, which people with any common colour blindness can tell apart; marks and labels
say the same thing again.
"""

import math
import textwrap
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from verl_avar.report.results import digits, number, percent, title

if TYPE_CHECKING:
    from verl_avar.report.report import HeatmapSample

BLUE, ORANGE, GREEN, GREY, BLACK = "#0072B2", "#E69F00", "#009E73", "#B3B3B3", "#222222"
VEIL = "#808080"  # grey, to be told from white and from black backgrounds alike
WIDTH = 7.0  # inches; with text of 12 points it stays readable when a phone scales the picture to its width
TEXT = 12
SMOOTH = 5  # GRPO steps in the running mean
SIDE = 336  # pixels of the longer side of a heat map


def accuracy(results: dict) -> Figure:
    """Accuracy of each stage over all tasks, beside its control with shuffled images, in %."""
    stages = results["stages"]
    series = [
        ("own image", BLUE, [number(stage, "accuracy", "all") for stage in stages]),
        ("shuffled images", GREY, [number(stage, "shuffled", "all") for stage in stages]),
    ]
    figure, axes = _bars(stages, series, lambda value: 100 * value, percent)
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
    panels = [series for series in (robust, paper) if any(_measured(values) for _, _, values in series)]
    if not panels:
        return None
    heights = [1.4 + 0.26 * len(stages) * (len(series) + 1) for series in panels]
    figure = Figure(figsize=(WIDTH, sum(heights)), dpi=150)
    figure.set_layout_engine("constrained")
    for axes, series in zip(
        figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0], panels, strict=True
    ):
        _bars(stages, series, float, digits, axes)
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
    figure, axes = _axes(1.4 + 0.5 * len(stages))
    left = np.zeros(len(stages))
    parts = [
        ("image", BLUE, shares[:, 0]),
        ("system turn", ORANGE, shares[:, 1]),
        ("the rest", GREY, 100 - shares.sum(1)),
    ]
    for name, colour, values in parts:
        axes.barh(range(len(stages)), values, left=left, color=colour, height=0.62, label=name)
        for row, (start, value) in enumerate(zip(left, values, strict=True)):
            if value >= 6:  # narrower parts have no room for their figure
                ink = "white" if colour == BLUE else BLACK
                axes.text(
                    start + value / 2, row, f"{value:.0f}", ha="center", va="center", color=ink, fontsize=TEXT - 1
                )
        left = left + values
    _stage_names(axes, stages)
    axes.set_xlim(0, 100)
    axes.set_xlabel("attention of the response's tokens, %", fontsize=TEXT)
    _legend(axes, 3)
    return figure


def rl(results: dict) -> Figure | None:
    """The reward's parts and the visual attention behind them over the GRPO steps: each step, and a running mean."""
    steps = results.get("rl") or []
    panels = [
        ("accuracy and format", [("acc", "accuracy", BLUE, "-"), ("format", "format", GREEN, "--")]),
        (
            "reward and its visual term",
            [("reward", "reward", BLACK, "-"), ("visual", "visual (counted)", ORANGE, "--")],
        ),
        ("VAS of the rollouts", [("visual_ratio", "image over system turn, right and wrong answers", ORANGE, "-")]),
        ("attention mass", [("visual_mass", "image", BLUE, "-"), ("system_mass", "system turn", ORANGE, "--")]),
    ]
    panels = [
        (name, drawn)
        for name, lines in panels
        if (drawn := [line for line in lines if _measured([number(row, line[0]) for row in steps])])
    ]
    if not panels:
        return None
    figure = Figure(figsize=(WIDTH, 0.4 + 2.3 * len(panels)), dpi=150)
    figure.set_layout_engine("constrained")
    at = [row["step"] for row in steps]
    grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (name, lines) in zip(grid, panels, strict=True):
        for key, label, colour, style in lines:
            values = np.array([np.nan if (value := number(row, key)) is None else value for row in steps])
            axes.plot(at, values, color=colour, alpha=0.3, linewidth=1)
            axes.plot(at, _running_mean(values), color=colour, linestyle=style, linewidth=2.2, label=label)
        axes.set_title(name, fontsize=TEXT, loc="left")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#E5E5E5")
        _plain(axes)
        axes.legend(fontsize=TEXT - 2, frameon=False, loc="upper left", bbox_to_anchor=(0, 0.98), ncols=2)
        low, high = axes.get_ylim()
        axes.set_ylim(low, low + 1.3 * (high - low))  # room for the legend
    grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[-1].set_xlabel(f"GRPO step (thin: each step; thick: mean of the last {SMOOTH})", fontsize=TEXT)
    return figure


def attention_heatmap(image: Image.Image, weights: np.ndarray | None = None, top: float | None = None) -> Image.Image:
    """The image behind a grey veil that is the thinner, the more attention a cell gets; without `weights`, no veil.

    A veil keeps the image's own colours where the response looks, which a colour map laid over it would hide.

    Args:
        weights: [rows, columns], attention to each cell of the image's token grid, not negative.
        top: the weight that lifts the veil, by default the largest; give one value to make several pictures comparable.
    """
    scale = SIDE / max(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    # Small images are enlarged as they are: smoothing would hide the pixels that the model saw.
    picture = image.convert("RGB").resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    if weights is None:
        return picture
    weights = np.asarray(weights, dtype=float)
    if weights.ndim != 2 or not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError(f"weights must be a finite, non-negative [rows, columns] array, got shape {weights.shape}")
    lifted = np.clip(weights / (top or weights.max() or 1.0), 0, 1)
    mask = Image.fromarray((255 * lifted).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    veiled = Image.blend(picture, Image.new("RGB", size, VEIL), 0.85)
    return Image.composite(picture, veiled, mask)


def brightest(sample: "HeatmapSample") -> float:
    """The largest weight of any step and cell, the common scale of a sample's pictures."""
    return max(float(np.max(weights)) for _, weights in sample.steps)


def heatmap_sheet(sample: "HeatmapSample", columns: int = 3) -> Figure:
    """The image and every step's heat map on one sheet, with the step's words above its picture."""
    top = brightest(sample)
    pictures = [(sample.question, attention_heatmap(sample.image))]
    for text, weights in sample.steps:
        words = f"{text.strip()}\n→ image: {percent(float(np.sum(weights)))} % of attention"
        pictures.append((words, attention_heatmap(sample.image, weights, top)))
    lines = math.ceil(len(pictures) / columns)
    figure = Figure(figsize=(3.1 * columns, 4.1 * lines), dpi=120)
    figure.set_layout_engine("constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, (words, picture) in zip(grid, pictures, strict=False):
        axes.imshow(picture)
        wrapped = "\n".join(textwrap.fill(line, 32) for line in words.splitlines())
        axes.set_title(wrapped, fontsize=TEXT - 2, loc="left", parse_math=False)
    figure.supxlabel(f"no veil: {percent(top)} % of a token's attention on that cell", fontsize=TEXT - 2)
    return figure


def _axes(height: float):
    figure = Figure(figsize=(WIDTH, height), dpi=150)
    figure.set_layout_engine("constrained")
    return figure, figure.subplots()


def _bars(stages: list[dict], series: list, scale, label, axes=None):
    """Horizontal bars, a group per stage and a bar per series, each with its figure written at its end."""
    figure = None
    if axes is None:
        figure, axes = _axes(1.2 + 0.26 * len(stages) * (len(series) + 1))
    height = 0.8 / len(series)
    for index, (name, colour, values) in enumerate(series):
        rows = [row + (index - (len(series) - 1) / 2) * height for row in range(len(stages))]
        lengths = [0 if value is None else scale(value) for value in values]
        axes.barh(rows, lengths, height=0.9 * height, color=colour, label=name)
        for row, length, value in zip(rows, lengths, values, strict=True):
            axes.annotate(
                label(value), (length, row), (4, 0), textcoords="offset points", va="center", fontsize=TEXT - 2
            )
    _stage_names(axes, stages)
    _legend(axes, len(series))
    return figure, axes


def _stage_names(axes, stages: list[dict]) -> None:
    names = [textwrap.fill(title(stage), 14) for stage in stages]
    axes.set_yticks(range(len(stages)), names, fontsize=TEXT)
    axes.invert_yaxis()
    _plain(axes)


def _legend(axes, columns: int) -> None:
    """Above the axes, under the title."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, fontsize=TEXT - 1, borderaxespad=0.2
    )


def _plain(axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=TEXT - 1)


def _measured(values: list) -> bool:
    return any(value is not None for value in values)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean of each step and up to SMOOTH - 1 before it; steps that were not measured do not count."""
    windows = [values[max(0, end - SMOOTH) : end] for end in range(1, len(values) + 1)]
    return np.array([np.nan if np.isnan(window).all() else np.nanmean(window) for window in windows])
