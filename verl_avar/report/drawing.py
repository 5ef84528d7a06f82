"""What every figure of a report shares: colours, sizes, and axes and bars drawn one way.

Colours are from Okabe and Ito's set, which people with any common colour blindness can tell apart; marks and labels
say the same thing again.
"""

import textwrap
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY, BLACK = "#0072B2", "#E69F00", "#009E73", "#B3B3B3", "#222222"
PURPLE, SKY, VERMILION = "#CC79A7", "#56B4E9", "#D55E00"
# Series told apart by colour, dash and mark together.
SERIES = [
    (BLUE, "-", "o"),
    (ORANGE, "--", "s"),
    (GREEN, "-.", "^"),
    (VERMILION, ":", "D"),
    (PURPLE, "-", "v"),
    (SKY, "--", "P"),
    (BLACK, "-.", "X"),
]
WIDTH = 7.0  # inches; with text of 12 points it stays readable when a phone scales the picture to its width
TEXT = 12


def panels(heights: Sequence[float], **subplots) -> tuple[Figure, list[Axes]]:
    """A figure of axes one above the other, of these heights in inches."""
    figure = Figure(figsize=(WIDTH, sum(heights)), dpi=150)
    figure.set_layout_engine("constrained")
    grid = figure.subplots(len(heights), 1, squeeze=False, height_ratios=list(heights), **subplots)
    return figure, list(grid[:, 0])


def bars_height(groups: int, series: int) -> float:
    """Inches that `bars` needs for groups of that many series, without a title."""
    return 1.2 + 0.26 * groups * (series + 1)


def bars(
    axes: Axes,
    names: Sequence[str],
    series: list[tuple[str, str, list[float | None]]],
    label: Callable[..., str],
    intervals: Sequence[Sequence[float] | None] | None = None,
) -> None:
    """Horizontal bars: a group per name, a bar per series (legend, colour, values), its figure written at its end.

    intervals: [low, high] of each of the first series' values, drawn over its bars.
    """
    height = 0.8 / len(series)
    for index, (name, colour, values) in enumerate(series):
        rows = [row + (index - (len(series) - 1) / 2) * height for row in range(len(names))]
        lengths = [0 if value is None else value for value in values]
        axes.barh(rows, lengths, height=0.9 * height, color=colour, label=name)
        for row, length, value, between in zip(
            rows, lengths, values, (intervals if index == 0 else None) or [None] * len(names), strict=True
        ):
            if between is not None:
                axes.plot(between, [row, row], color=BLACK, linewidth=2, solid_capstyle="butt")
                length = max(length, between[1])
            axes.annotate(
                label(value), (length, row), (4, 0), textcoords="offset points", va="center", fontsize=TEXT - 2
            )
    row_names(axes, names)
    legend(axes, len(series))


def stacked(axes: Axes, names: Sequence[str], parts: list[tuple[str, str, Sequence[float]]]) -> None:
    """A horizontal bar per name, divided into parts (legend, colour, values in %), with the figures in them."""
    left = [0.0] * len(names)
    for name, colour, values in parts:
        axes.barh(range(len(names)), values, left=left, color=colour, height=0.62, label=name)
        for row, (start, value) in enumerate(zip(left, values, strict=True)):
            if value >= 6:  # narrower parts have no room for their figure
                ink = "white" if colour == BLUE else BLACK
                axes.text(
                    start + value / 2, row, f"{value:.0f}", ha="center", va="center", color=ink, fontsize=TEXT - 1
                )
        left = [start + value for start, value in zip(left, values, strict=True)]
    row_names(axes, names)
    axes.set_xlim(0, 100)
    legend(axes, 3)


def row_names(axes: Axes, names: Sequence[str]) -> None:
    """Names beside the bars, in at most three lines each."""
    wrapped = [textwrap.fill(name, 16, max_lines=3, placeholder=" …") for name in names]
    axes.set_yticks(range(len(names)), wrapped, fontsize=TEXT)
    axes.invert_yaxis()
    plain(axes)


def legend(axes: Axes, columns: int) -> None:
    """Above the axes, under the title."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, fontsize=TEXT - 1, borderaxespad=0.2
    )


def literal(name: str) -> str:
    """A name that matplotlib writes as it is: dollars would open formulas, and legends leave out what begins with _."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=TEXT - 1)


def wide_range(values: Sequence[float | None]) -> bool:
    """Whether positive values differ so much that only a log axis shows them all."""
    positive = [value for value in values if value is not None and value > 0]
    return bool(positive and max(positive) > 30 * min(positive))


def measured(values: list) -> bool:
    return any(value is not None for value in values)
