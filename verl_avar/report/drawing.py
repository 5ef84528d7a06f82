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
    axes: Axes, names: Sequence[str], series: list[tuple[str, str, list[float | None]]], label: Callable[..., str]
) -> None:
    """Horizontal bars: a group per name, a bar per series (legend, colour, values), its figure written at its end."""
    height = 0.8 / len(series)
    for index, (name, colour, values) in enumerate(series):
        rows = [row + (index - (len(series) - 1) / 2) * height for row in range(len(names))]
        lengths = [0 if value is None else value for value in values]
        axes.barh(rows, lengths, height=0.9 * height, color=colour, label=name)
        for row, length, value in zip(rows, lengths, values, strict=True):
            axes.annotate(
                label(value), (length, row), (4, 0), textcoords="offset points", va="center", fontsize=TEXT - 2
            )
    row_names(axes, names)
    legend(axes, len(series))


def row_names(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [textwrap.fill(name, 14) for name in names], fontsize=TEXT)
    axes.invert_yaxis()
    plain(axes)


def legend(axes: Axes, columns: int) -> None:
    """Above the axes, under the title."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, fontsize=TEXT - 1, borderaxespad=0.2
    )


def plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=TEXT - 1)


def measured(values: list) -> bool:
    return any(value is not None for value in values)
