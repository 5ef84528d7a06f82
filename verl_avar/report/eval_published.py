"""The paper's tables as a figure: averages of all models that have one, and where each benchmark's models stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from verl_avar.report.drawing import BLACK, BLUE, GREY, ORANGE, TEXT, legend, literal, panels, plain

if TYPE_CHECKING:
    from verl_avar.evaluation.benchmark.published import Row

HOLLOW, FINAL = "white", "AVAR-Thinker"


def comparison(rows: Sequence[Row]) -> Figure:
    """Above: recomputed averages, lowest first, the printed one as a ring where it is another. Below: every model's
    figure on each benchmark; the paper's own stages and base stand out."""
    from verl_avar.evaluation.benchmark.published import ROUNDING, TITLES

    whole = sorted((row for row in rows if row.recomputed is not None), key=lambda row: row.recomputed)
    bases = {row.base for row in rows if row.base}
    figure, (averages, single) = panels([1.4 + 0.32 * len(whole), 1.5 + 0.48 * len(TITLES)])
    for row, at in zip(whole, range(len(whole)), strict=True):
        averages.barh(at, float(row.recomputed), height=0.68, color=_colour(row, bases))
        words = f"{row.recomputed:.1f}"
        if row.average is not None and abs(row.average - row.recomputed) > ROUNDING:
            averages.plot(float(row.average), at, "o", color=BLACK, markerfacecolor=HOLLOW, markersize=7, zorder=3)
            words += f" ({row.average} printed)"
        end = max(float(row.recomputed), float(row.average or 0))
        averages.annotate(words, (end, at), (6, 0), textcoords="offset points", va="center", fontsize=TEXT - 2)
    averages.set_yticks(range(len(whole)), [literal(row.model) for row in whole], fontsize=TEXT - 1)
    averages.set_xlim(0, 1.22 * max(float(row.recomputed) for row in whole))
    averages.set_xlabel("average of the seven benchmarks, %, as published", fontsize=TEXT)
    plain(averages)
    labelled = set()
    styles = {  # in the order of drawing
        "others": (GREY, "|", 11, GREY),
        "base": (ORANGE, "s", 9, ORANGE),
        "its stages": (BLUE, "o", 8, HOLLOW),
        "AVAR": (BLUE, "o", 9, BLUE),
    }
    kinds = [
        "others" if not row.base and row.model not in bases
        else "base" if not row.base
        else "AVAR" if row.model == FINAL else "its stages"
        for row in rows
    ]  # fmt: skip
    for kind, (colour, mark, size, face) in styles.items():
        for row in (row for row, own in zip(rows, kinds, strict=True) if own == kind):
            known = [(float(row.figures[name]), at) for at, name in enumerate(TITLES) if row.figures[name] is not None]
            single.plot(*zip(*known, strict=True), mark, color=colour, markersize=size, markerfacecolor=face,
                        markeredgewidth=1.7, label=None if kind in labelled else kind)  # fmt: skip
            labelled.add(kind)
    single.set_yticks(range(len(TITLES)), list(TITLES.values()), fontsize=TEXT - 1)
    single.invert_yaxis()
    single.grid(axis="y", color="#EFEFEF")
    single.set_axisbelow(True)
    single.set_xlabel("accuracy, %, as published", fontsize=TEXT)
    legend(single, 4)
    plain(single)
    return figure


def _colour(row: Row, bases: set[str]) -> str:
    return BLUE if row.base else ORANGE if row.model in bases else GREY
