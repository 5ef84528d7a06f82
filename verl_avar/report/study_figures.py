"""Figures of the two studies on VAS: its correlation with accuracy, and the training-free intervention (AVAR §2.2,
§2.3, arXiv:2603.03825)."""

import itertools
import math
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from verl_avar.report.drawing import BLACK, BLUE, GREY, ORANGE, TEXT, WIDTH, panels, plain, wide_range
from verl_avar.report.results import digits, number

SHADES = ("#F2F2F2", "#E3EEF5", "#CFE3F0")  # of the paper's classes, from narrow to panoramic
MEASURES = {"vas": "VAS", "head_mean": "VAS, heads averaged", "median": "VAS, heads averaged, median"}
ROW = 0.42  # inches of a row of the intervention's figure
NAME = 28  # characters of a point's label
HALO = (withStroke(linewidth=2.5, foreground="white"),)  # keeps words readable on lines


def correlation_figure(
    points: Sequence[dict], statistics: dict, scope: str = "user", measure: str = "vas", unit: str = ""
) -> Figure:
    """Checkpoints by VAS and accuracy, with the line of least squares and the correlation.

    points: dicts with name, vas, accuracy. statistics: as `evaluation.correlate.correlate` gives them. scope, measure:
    which VAS it is; the paper's classes are shaded where they apply, to the user scope's `vas`. unit: of accuracy.
    """
    figure, (axes,) = panels([5.4])
    FigureCanvasAgg(figure)
    x, y = (np.array([point[key] for point in points], dtype=float) for key in ("vas", "accuracy"))
    width, height = (np.ptp(values) or abs(values[0]) or 1.0 for values in (x, y))
    left, right = x.min() - 0.12 * width, x.max() + 0.12 * width
    left = max(0.0, left) if x.min() >= 0 else left
    if (scope, measure) == ("user", "vas"):
        _classes(axes, left, right)
    line = statistics["line"]
    ends = np.array([x.min(), x.max()])
    axes.plot(ends, line["intercept"] + line["slope"] * ends, "--", color=ORANGE, linewidth=2, zorder=2)
    axes.plot(x, y, "o", color=BLUE, markersize=8, markeredgecolor="white", zorder=3, clip_on=False)
    axes.set_xlim(left, right)
    axes.set_ylim(y.min() - 0.14 * height, y.max() + 0.2 * height)  # room above for the classes' names
    axes.set_xlabel(f"{MEASURES[measure]} ({'user turn' if scope == 'user' else scope})", fontsize=TEXT)
    axes.set_ylabel(f"accuracy{', ' * bool(unit)}{unit}", fontsize=TEXT)
    axes.set_title("\n".join(_correlation(statistics)), fontsize=TEXT, loc="left")
    plain(axes)
    _label(figure, axes, x, y, [_short(point["name"]) for point in points], line["intercept"] + line["slope"] * ends)
    return figure


def _short(name: str) -> str:
    """A name of at most NAME characters: checkpoints often differ at the end only."""
    return name if len(name) <= NAME else f"{name[: NAME // 2 - 1]}…{name[-NAME // 2 :]}"


def _correlation(statistics: dict) -> list[str]:
    pearson, spearman = statistics["pearson"], statistics["spearman"]
    low, high = pearson["interval"]
    return [
        f"{statistics['points']} checkpoints: r = {pearson['r']:.3f}, p = {pearson['p']:.2g} "
        f"(95 %: {low:.2f} to {high:.2f}, bootstrap)",
        f"ranks: ρ = {spearman['rho']:.3f}, p = {spearman['p']:.2g}",
    ]


def _classes(axes: Axes, left: float, right: float) -> None:
    """Bands of the paper's classes, each named where it has room for its name."""
    from verl_avar.vas import CLASSES  # brings torch along

    low = -math.inf
    for (bound, name), shade in zip(CLASSES, SHADES, strict=True):
        start, end = max(low, left), min(bound, right)
        if start < end:
            axes.axvspan(start, end, color=shade, linewidth=0, zorder=0)
            between = "<" if low == -math.inf else ">" if math.isinf(bound) else ""
            label = (
                f"{name}\n{between} {low if between == '>' else bound:g}" if between else f"{name}\n{low:g}–{bound:g}"
            )
            if (end - start) > 0.16 * (right - left):
                at = (start + end) / 2
                axes.text(
                    at, 0.98, label, transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=TEXT - 1
                )
        low = bound


def _label(figure: Figure, axes: Axes, x: np.ndarray, y: np.ndarray, names: Sequence[str], line: np.ndarray) -> None:
    """Names beside the points, each at the first place near it that is free; line: its heights at both ends of x."""
    at_left, at_right = line
    arrow = {"arrowstyle": "-", "color": GREY, "shrinkA": 0, "shrinkB": 5}
    how = {"fontsize": TEXT - 2, "parse_math": False, "path_effects": HALO, "arrowprops": arrow}
    texts = [
        axes.annotate(name, at, at, textcoords="offset points", **how) for name, *at in zip(names, x, y, strict=True)
    ]
    for text in texts:
        text.set_in_layout(False)
    figure.draw_without_rendering()  # fixes the axes' place
    renderer = figure.canvas.get_renderer()
    frame, dot = axes.get_window_extent(renderer), 0.09 * figure.dpi
    along = np.linspace(0, 1, 40)[:, None]  # the line, in small pieces
    line = along * [x.max(), at_right] + (1 - along) * [x.min(), at_left]
    sizes = [dot] * len(x) + [dot / 3] * len(line)
    places = axes.transData.transform(np.r_[np.c_[x, y], line])
    taken = [Bbox.from_bounds(px - d, py - d, 2 * d, 2 * d) for (px, py), d in zip(places, sizes, strict=True)]
    written = [text.get_window_extent(renderer) for text in axes.texts if text not in texts]
    for own, text in enumerate(texts):
        best = None
        for radius, (dx, dy) in itertools.product((9, 18, 30, 45, 60), _DIRECTIONS):
            text.set_position((radius * dx, radius * dy))
            text.set_horizontalalignment("left" if dx > 0 else "right" if dx < 0 else "center")
            text.set_verticalalignment("bottom" if dy > 0 else "top" if dy < 0 else "center")
            box = Text.get_window_extent(text, renderer)  # without the arrow
            area = box.width * box.height
            covered = sum(_overlap(box, other) for other in taken)
            covered += 10 * (sum(_overlap(box, other) for other in written) + area - _overlap(box, frame))
            away = np.hypot(*(places[: len(x)] - np.clip(places[: len(x)], box.min, box.max)).T)
            if np.any(np.delete(away, own) < 1.3 * away[own]):  # it would be taken for another point's name
                covered += area / 2
            if best is None or covered < best[0] - 1:
                best = (covered, text.get_position(), text.get_horizontalalignment(), text.get_verticalalignment(), box)
            if best[0] < 1:
                break
        _, position, horizontal, vertical, box = best
        text.set_position(position)
        text.set_horizontalalignment(horizontal)
        text.set_verticalalignment(vertical)
        written.append(box)


_DIRECTIONS = tuple(
    (x, y) for x, y in itertools.product((1, -1, 0, 0.7, -0.7), repeat=2) if 0.9 < math.hypot(x, y) < 1.3
)


def _overlap(first: Bbox, second: Bbox) -> float:
    shared = Bbox.intersection(first, second)
    return 0.0 if shared is None else shared.width * shared.height


def intervention_figure(points: Sequence[dict]) -> Figure:
    """The points of a sweep, a row each: accuracy and its change, then VAS, length and format of the responses.

    points: as in intervene.json (`evaluation.intervene.summarise`), the baseline first. Bars are 95 % intervals; a full
    mark stands for a change from the baseline that is clear (`evaluation.paired.compare`). VAS is head-averaged.
    """
    height = 1.1 + ROW * len(points)
    figure = Figure(figsize=(WIDTH, 2 * height), dpi=150)
    figure.set_layout_engine("constrained")
    upper, lower = figure.subfigures(2, 1)
    answers, responses = upper.subplots(1, 2, sharey=True), lower.subplots(1, 3, sharey=True)
    _rows(answers[0], points, "right answers, %", "accuracy", factor=100)
    _rows(answers[1], points, "change, points (paired)", "accuracy", factor=100, change=True)
    _rows(responses[0], points, "VAS, response", "head_mean")
    _rows(responses[1], points, "length, tokens", "tokens")
    _rows(responses[2], points, "right format, %", "format", factor=100)
    for axes in (answers[0], responses[0]):
        names = [textwrap.fill(str(point["name"]), 18, max_lines=2, placeholder=" …") for point in points]
        axes.set_yticks(range(len(points)), names, fontsize=TEXT - 1)
        axes.set_ylim(len(points) - 0.4, -0.7)
    note = (
        "bars: 95 % intervals; full marks: a change beyond chance",
        "(each for itself, not corrected for number)",
    )
    lower.supxlabel("\n".join(note), fontsize=TEXT - 1)
    return figure


def _rows(axes: Axes, points: Sequence[dict], title: str, key: str, factor: float = 1, change: bool = False) -> None:
    """A figure of every point, with its interval and the baseline's value as a line."""
    value, interval = ("difference", "difference_interval") if change else ("value", "interval")
    baseline = 0.0 if change else number(points[0], key, "value")
    if baseline is not None:
        axes.axvline(factor * baseline, color=GREY, linestyle="--", linewidth=1.5, zorder=0)
    for row, point in enumerate(points):
        at = number(point, key, value)
        if at is None:
            if not (change and row == 0):  # the baseline has no change
                axes.annotate("–", (0.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=TEXT - 1)
            continue
        ends = point[key].get(interval)
        if ends is not None:
            axes.plot([factor * ends[0], factor * ends[1]], [row, row], color=BLUE, linewidth=2, solid_capstyle="butt")
        colour = BLACK if row == 0 else BLUE
        face = colour if point[key]["clear"] or row == 0 else "white"
        mark = "s" if row == 0 else "o"
        axes.plot(factor * at, row, mark, color=colour, markerfacecolor=face, markersize=7, markeredgewidth=1.8)
        words = f"{factor * at:+.1f}" if change else f"{factor * at:.1f}" if factor == 100 else digits(at)
        axes.annotate(
            words,
            (factor * at, row),
            (0, 6),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=TEXT - 3,
            path_effects=HALO,
        )
    log = not change and factor == 1 and wide_range([number(point, key, "value") for point in points])
    axes.set_title(title + ", log" * log, fontsize=TEXT - 1, loc="left")
    axes.margins(x=0.15)
    if log:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.grid(axis="y", color="#EFEFEF")
    axes.set_axisbelow(True)
    plain(axes)
    axes.tick_params(axis="x", labelsize=TEXT - 2)
    axes.tick_params(axis="y", length=0)
