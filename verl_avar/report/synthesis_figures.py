"""Figures of a synthesis run, drawn by matplotlib; each returns None where the run has nothing to show in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from verl_avar.report.drawing import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    TEXT,
    VERMILION,
    legend,
    literal,
    panels,
    plain,
    row_names,
)

if TYPE_CHECKING:
    from verl_avar.synthesis.distributions import Distributions

WHERE = {"intake": GREY, "describe": SKY, "reason": ORANGE, "anchor": GREEN, "attention": PURPLE}
LENGTHS = 30  # bins
MOST_REASONS = 16  # bars of single reasons; the others share one
MOST_ANCHORS = 20  # bars of single numbers of anchors


def figures(seen: Distributions, reasons: Mapping[str, Mapping[str, int]]) -> dict[str, Figure]:
    """By file name without its ending, those that there are. reasons: {stage: {reason: rows}}."""
    drawn = {
        "chain_length": chain_length(seen.chain_words, seen.anchored_words),
        "anchors_per_chain": anchors_per_chain(seen.anchors),
        "anchor_positions": anchor_positions(seen.positions),
        "rejects": rejects(reasons),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def chain_length(before: Counter[int], after: Counter[int]) -> Figure | None:
    """Words of the accepted chains, as they were reasoned and as they were anchored."""
    both = [length for length in before | after if length > 0]
    if not both:
        return None
    low, high = min(both), max(both)
    log = high > 30 * low
    if log:
        edges = np.geomspace(low, high + 1, LENGTHS + 1)
    else:
        width = -(-(high + 1 - low) // LENGTHS)  # whole words, so that no bin holds more lengths than another
        edges = np.arange(low, high + 1 + width, width)
    figure, (axes,) = panels([3.2])
    for counts, label, colour, dash in ((before, "before anchoring", ORANGE, "--"), (after, "after", BLUE, "-")):
        lengths, rows = list(counts), list(counts.values())
        heights, _ = np.histogram(lengths, edges, weights=rows)
        middle = weighted_median(counts)
        axes.stairs(heights, edges, color=colour, linestyle=dash, linewidth=2.2, label=f"{label} (median {middle:,})")
        axes.axvline(middle, color=colour, linestyle=dash, linewidth=1)
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    _counts(axes, "rows")
    axes.set_xlabel(f"words of the chain{', log scale' * log}", fontsize=TEXT)
    legend(axes, 2)
    return figure


def anchors_per_chain(anchors: Counter[int]) -> Figure | None:
    """How many looks at the image the accepted chains have."""
    if not anchors:
        return None
    most = max(anchors)
    shown = min(most, MOST_ANCHORS)
    heights = [anchors.get(number, 0) for number in range(shown)]
    heights.append(sum(rows for number, rows in anchors.items() if number >= shown))
    figure, (axes,) = panels([2.8])
    axes.bar(range(shown + 1), heights, color=BLUE, width=0.8)
    mean = sum(number * rows for number, rows in anchors.items()) / anchors.total()
    axes.set_title(f"mean {mean:.1f}, median {weighted_median(anchors)}", fontsize=TEXT, loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if most > shown:
        ticks = [*range(0, shown, 5), shown]
        axes.set_xticks(ticks, [*map(str, ticks[:-1]), f"≥ {shown}"])
    _counts(axes, "rows")
    axes.set_xlabel("looks at the image in the chain", fontsize=TEXT)
    return figure


def anchor_positions(positions: Sequence[int]) -> Figure | None:
    """Where along the chain its looks at the image begin, in equal parts of its length."""
    total = sum(positions)
    if not total:
        return None
    edges = np.linspace(0, 100, len(positions) + 1)
    figure, (axes,) = panels([2.8])
    axes.bar(edges[:-1], [100 * count / total for count in positions], np.diff(edges), align="edge", color=BLUE,
             edgecolor="white")  # fmt: skip
    axes.axhline(100 / len(positions), color=BLACK, linestyle="--", linewidth=1.2, label="if they were spread evenly")
    axes.set_xlim(0, 100)
    _counts(axes, f"% of {total:,} looks", whole=False)
    axes.set_xlabel("place in the chain, % of its length", fontsize=TEXT)
    legend(axes, 1)
    return figure


def rejects(reasons: Mapping[str, Mapping[str, int]]) -> Figure | None:
    """Rejected rows by reason, in the order of the stages that rejected them."""
    found = [(stage, reason, rows) for stage, part in reasons.items() for reason, rows in part.items() if rows]
    if not found:
        return None
    found.sort(key=lambda one: -one[2])
    kept, rest = found[:MOST_REASONS], sum(rows for *_, rows in found[MOST_REASONS:])
    order = [*WHERE, *sorted({stage for stage, *_ in kept} - set(WHERE))]
    kept.sort(key=lambda one: (order.index(one[0]), -one[2]))
    if rest:
        kept.append(("", f"{len(found) - MOST_REASONS} others", rest))
    total = sum(rows for *_, rows in found)
    figure, (axes,) = panels([1.2 + 0.46 * len(kept)])
    for stage in dict.fromkeys(stage for stage, *_ in kept):
        at = [index for index, one in enumerate(kept) if one[0] == stage]
        colour = WHERE.get(stage, VERMILION)
        axes.barh(at, [kept[index][2] for index in at], height=0.7, color=colour, label=stage or "several stages")
    for index, (*_, rows) in enumerate(kept):
        said = f"{rows:,} ({100 * rows / total:.0f} %)"
        axes.annotate(said, (rows, index), (4, 0), textcoords="offset points", va="center", fontsize=TEXT - 2)
    row_names(axes, [literal(reason.replace("_", " ")) for _, reason, _ in kept])
    axes.margins(x=0.2)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("rejected rows", fontsize=TEXT)
    legend(axes, 3)
    return figure


def weighted_median(counts: Mapping[int, int]) -> int:
    """The lower median of values that each stand for a count."""
    half, seen = sum(counts.values()) / 2, 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= half:
            return value
    raise ValueError("no values")


def _counts(axes: Axes, label: str, whole: bool = True) -> None:
    axes.set_ylabel(label, fontsize=TEXT)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=whole))
    axes.grid(axis="y", color="#E5E5E5")
    axes.set_axisbelow(True)
    plain(axes)
