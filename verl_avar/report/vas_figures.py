"""Figures of `avar vas`, drawn by matplotlib; each returns None where the results lack what it shows.

Those that take several results lay them over each other. The schema of a result is in vas_results.py.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from verl_avar.report.drawing import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SERIES,
    TEXT,
    bars,
    bars_height,
    measured,
    panels,
    plain,
    stacked,
    wide_range,
)
from verl_avar.report.results import digits, number
from verl_avar.report.vas_results import SCOPES, between, main_scope, scopes_of, series

POINTS = 60  # marks of a line over response positions; longer responses are averaged in bins
OUTER = 0.01  # share of the heads at either end that a log colour scale leaves to its arrows
MARKED = 40  # layers up to which each has its mark
ROLES = (("visual", "image", BLUE, "-"), ("system", "system turn", ORANGE, "--"), ("user", "question", GREEN, "-."),
         ("response", "response", PURPLE, ":"))  # fmt: skip


def masses(results: Sequence[dict], names: Sequence[str]) -> Figure | None:
    """How attention divides over roles, for each result and scope, in %; where the masses are parts of one whole."""
    rows = []
    for name, result, scope in _measured_scopes(results, names):
        if result.get("cross_attention"):
            continue
        values = [number(result, "scopes", scope, "mass", role) for role, *_ in ROLES]
        if values[0] is not None:
            rows.append((name, [100 * (value or 0) for value in values]))
    if not rows:
        return None
    figure, (axes,) = panels([1.7 + (0.5 if len(results) == 1 else 0.65) * len(rows)])
    parts = [(label, colour, [values[i] for _, values in rows]) for i, (_, label, colour, _) in enumerate(ROLES)]
    rest = [max(0.0, 100 - sum(values)) for _, values in rows]
    stacked(axes, [name for name, _ in rows], [*parts, ("else", GREY, rest)])
    axes.set_xlabel("attention, %", fontsize=TEXT)
    return figure


def robustness(results: Sequence[dict], names: Sequence[str]) -> Figure | None:
    """VAS with its 95 % interval, beside VAS without sinks and without border: heads averaged, and the paper's."""
    rows = list(_measured_scopes(results, names))
    kinds = [
        ("Heads averaged before the ratio", "head_mean", "head_mean_interval", "head_mean", "no_border_head_mean"),
        ("Paper's VAS: mean of the ratios of single heads", "vas", "interval", "vas", "no_border_vas"),
    ]
    drawn = []
    any_sinks = any(number(r, "scopes", s, "sinks", "tokens") for _, r, s in rows)
    for title, key, interval, no_sinks, no_border in kinds:
        values = [
            ("all image tokens", BLUE, [number(r, "scopes", s, key) for _, r, s in rows]),
            ("without sinks", ORANGE, [number(r, "scopes", s, "sinks", no_sinks) for _, r, s in rows] * any_sinks),
            ("without border", GREEN, [number(r, "scopes", s, "sinks", no_border) for _, r, s in rows]),
        ]
        if measured(values[0][2]):
            values = [one for one in values if measured(one[2])]
            drawn.append((title, values, [between(r["scopes"][s], interval) for _, r, s in rows]))
    if not drawn:
        return None
    figure, grid = panels([0.2 + bars_height(len(rows), len(values)) for _, values, _ in drawn])
    for axes, (title, values, intervals) in zip(grid, drawn, strict=True):
        bars(axes, [name for name, *_ in rows], values, digits, intervals)
        axes.set_title(title, fontsize=TEXT, loc="left", pad=28)
        log = wide_range([value for _, _, column in values for value in column])
        if log:
            axes.set_xscale("log")
        axes.set_xlabel(f"image / system turn{', log scale' * log}", fontsize=TEXT)
        axes.margins(x=0.15)
    return figure


def by_layer(results: Sequence[dict], names: Sequence[str]) -> Figure | None:
    """VAS and the two masses behind it over layers: scopes of one result, or one scope of several results."""
    if len(results) == 1:
        (result,) = results
        at = [(SCOPES[scope], result, scope) for scope in scopes_of(results)]
    elif (scope := main_scope(results)) is not None:
        at = [(name, result, scope) for name, result in zip(names, results, strict=True)]
    else:
        return None
    kinds = [
        ("VAS, heads averaged (image / system turn)", "head_mean", 1),
        ("attention to the image, %", "visual", 100),
        ("attention to the system turn, %", "system", 100),
    ]
    drawn = []
    for title, key, factor in kinds:
        lines = [
            (label, result["layers"], factor * values, style)
            for (label, result, scope), style in zip(at, _styles(len(at)), strict=True)
            if (values := series(result, "scopes", scope, "by_layer", key)) is not None
        ]
        if lines:
            drawn.append((title, lines))
    if not drawn:
        return None
    figure, grid = panels([2.4] * len(drawn), sharex=True)
    for axes, (title, lines) in zip(grid, drawn, strict=True):
        for label, layers, values, (colour, dash, mark) in lines:
            marker = mark if len(layers) <= MARKED else None
            axes.plot(layers, values, dash, color=colour, marker=marker, markersize=5, linewidth=2, label=label)
        _line_axes(axes, title, [values for _, _, values, _ in lines])
    _legend_above(grid[0], 2 if len(at) > 3 else 3)
    grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    what = "" if len(results) == 1 else f" ({SCOPES[at[0][2]]})"
    grid[-1].set_xlabel(f"layer{what}", fontsize=TEXT)
    return figure


def by_position(results: Sequence[dict], names: Sequence[str]) -> Figure | None:
    """Attention of each token of the responses, by its place: all roles of one result, or the image for several."""
    known = [
        (name, result["positions"])
        for name, result in zip(names, results, strict=True)
        if series(result, "positions", "visual") is not None
    ]
    if not known:
        return None
    width = -(-max(len(positions["position"]) for _, positions in known) // POINTS)
    styles = _styles(len(results))
    upper = [
        [
            (label, positions, role, (colour, dash, None))
            for role, label, colour, dash in ROLES
            for _, positions in known
        ]
        if len(results) == 1
        else [(name, p, "visual", style) for (name, p), style in zip(known, styles, strict=False)],
        [(name, p, "head_mean", style) for (name, p), style in zip(known, styles, strict=False)],
    ]
    titles = ["attention, %" if len(results) == 1 else "attention to the image, %", "VAS, heads averaged"]
    kept = [(lines, title) for lines, title in zip(upper, titles, strict=True) if any(_has(line) for line in lines)]
    figure, grid = panels([3.0, *[2.0] * (len(kept) - 1), 1.2], sharex=True)
    for axes, (lines, title) in zip(grid, kept, strict=False):
        shown = []
        for label, positions, key, (colour, dash, mark) in lines:
            if _has((label, positions, key)):
                at, values, _ = binned(positions, key, width)
                shown.append(values * (1 if key == "head_mean" else 100))
                marker = mark if 1 < len(at) <= MARKED else "o" if len(at) == 1 else None
                axes.plot(at, shown[-1], dash, color=colour, marker=marker, markersize=5, linewidth=2, label=label)
        _line_axes(axes, title, shown)
    _legend_above(grid[0], 4 if len(results) == 1 else 2 if len(results) > 3 else 3)
    for (_, positions), (colour, dash, _) in zip(
        known, styles if len(results) > 1 else [(GREY, "-", "")], strict=False
    ):
        at, _, count = binned(positions, "visual", width)
        grid[-1].plot(at, count, dash, color=colour, linewidth=2, marker="o" if len(at) == 1 else None)
        if len(results) == 1:
            grid[-1].fill_between(at, count, color=GREY, alpha=0.4, linewidth=0)
    _line_axes(grid[-1], "samples that reach it", [])
    grid[-1].yaxis.set_major_locator(MaxNLocator(3, integer=True))
    grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    grid[-1].set_xlabel("token of the response" + (f" (means of {width} tokens)" if width > 1 else ""), fontsize=TEXT)
    return figure


def head_map(result: dict, scope: str) -> Figure | None:
    """Layer × head: attention to the image, and VAS on a log scale; a ring marks the strongest head of each map."""
    maps = [
        ("attention to the image, %", 100, series(result, "scopes", scope, "by_head", "visual")),
        ("VAS (log scale)", 1, series(result, "scopes", scope, "by_head", "vas")),
    ]
    maps = [(title, factor * values) for title, factor, values in maps if values is not None]
    if not maps or maps[0][1].size < 2 or result.get("cross_attention"):  # its heads are all the same
        return None
    layers, heads = maps[0][1].shape
    colours = colormaps["viridis"].with_extremes(bad="#DDDDDD")
    figure, grid = panels([0.9 + min(max(0.1 * heads, 1.0), 3.6)] * len(maps), sharex=True)
    for axes, (title, values) in zip(grid, maps, strict=True):
        positive = values[values > 0]
        norm = Normalize(0, np.nanmax(values) or 1)
        if title.startswith("VAS"):
            # A few heads may lie powers of ten away from all others.
            low = np.quantile(positive, OUTER, method="lower") if positive.size else 0.1
            high = np.quantile(positive, 1 - OUTER, method="higher") if positive.size else 10
            norm = LogNorm(low, high) if high > low else LogNorm(low / 2, low * 2)
            values = np.where(values == 0, positive.min() if positive.size else low, values)  # log(0)
        drawn = axes.imshow(values.T, aspect="auto", origin="lower", cmap=colours, norm=norm, interpolation="nearest")
        axes.plot(
            *_strongest(values), "o", markersize=9, markerfacecolor="none", markeredgecolor=BLACK, markeredgewidth=3
        )
        axes.plot(*_strongest(values), "o", markersize=9, markerfacecolor="none", markeredgecolor="white")
        axes.set_title(title, fontsize=TEXT, loc="left")
        axes.set_ylabel("head", fontsize=TEXT)
        axes.tick_params(labelsize=TEXT - 1)
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        beyond = (norm.vmin > np.nanmin(values), norm.vmax < np.nanmax(values))
        extend = {(0, 0): "neither", (0, 1): "max", (1, 0): "min", (1, 1): "both"}[beyond]
        bar = figure.colorbar(drawn, ax=axes, pad=0.02, fraction=0.06, extend=extend)
        bar.ax.tick_params(labelsize=TEXT - 2)
        if isinstance(norm, LogNorm) and norm.vmax < 100 * norm.vmin:  # few powers of ten lie on the bar
            bar.set_ticks(np.geomspace(norm.vmin, norm.vmax, 4))
            bar.minorticks_off()
            bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: digits(value)))
    grid[-1].set_xlabel(f"layer ({SCOPES[scope]})", fontsize=TEXT)
    every = -(-layers // 12)
    grid[-1].set_xticks(range(0, layers, every), [str(layer) for layer in result["layers"][::every]])
    return figure


def binned(positions: dict, key: str, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centres, means (each position by its samples) and mean sample counts of bins of `width` positions."""
    at, count, values = (np.array(positions[name], dtype=float) for name in ("position", "n", key))
    starts = np.arange(0, len(at), width)
    known = np.isfinite(values)
    weights = np.where(known, count, 0)
    total = np.add.reduceat(weights, starts)
    with np.errstate(invalid="ignore"):
        means = np.add.reduceat(np.where(known, values, 0) * weights, starts) / total
    sizes = np.diff([*starts, len(at)])
    return np.add.reduceat(at, starts) / sizes, means, np.add.reduceat(count, starts) / sizes


def _measured_scopes(results: Sequence[dict], names: Sequence[str]):
    """(label, result, scope) of every scope of every result; the label needs no name where there is one result."""
    for scope in scopes_of(results):
        for name, result in zip(names, results, strict=True):
            if scope in result["scopes"]:
                yield (SCOPES[scope] if len(results) == 1 else f"{name}, {SCOPES[scope]}"), result, scope


def _styles(count: int) -> list[tuple[str, str, str]]:
    return [SERIES[i % len(SERIES)] for i in range(count)]


def _has(line: tuple) -> bool:
    return series(line[1], line[2]) is not None


def _strongest(values: np.ndarray) -> tuple[int, int]:
    layer, head = np.unravel_index(np.nanargmax(values), values.shape)
    return int(layer), int(head)


def _line_axes(axes, title: str, values: list[np.ndarray]) -> None:
    positive = [value for line in values for value in line[np.isfinite(line)]]
    if wide_range(positive) and "%" not in title:
        axes.set_yscale("log")
        title += ", log scale"
    else:
        axes.set_ylim(0, 1.08 * max(positive) if positive and max(positive) > 0 else None)
    axes.set_title(title, fontsize=TEXT, loc="left")
    axes.grid(axis="y", color="#E5E5E5")
    axes.set_axisbelow(True)
    plain(axes)


def _legend_above(axes, columns: int) -> None:
    """Above the title of the first axes of a column."""
    handles, _ = axes.get_legend_handles_labels()
    if len(handles) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.12), ncols=columns, frameon=False, fontsize=TEXT - 1)
