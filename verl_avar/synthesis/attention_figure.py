"""The figure of attention-aware selection: who is kept, and how attention goes with the length of a chain."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from verl_avar.report.drawing import BLACK, BLUE, GREY, TEXT, legend, panels, plain

BINS = 30
POINTS = 3000  # chains drawn in the lower panel, evenly spread over the rows


def figure(rows: pd.DataFrame, found: dict) -> Figure:
    """Above, the attention of kept and dropped chains; below, attention against words.

    rows and found: of `selection.report`, with at least one measured row.
    """
    rows = rows[rows["attention"].notna()]
    kept, dropped = rows[rows["kept"]], rows[~rows["kept"]]
    figure, (spread, length) = panels([2.9, 3.1])
    edges = np.histogram_bin_edges(rows["attention"], BINS)
    series = [(kept, BLUE, "o", f"kept ({len(kept)})"), (dropped, GREY, "x", f"dropped ({len(dropped)})")]
    series = [entry for entry in series if len(entry[0])]
    spread.hist(
        [part["attention"] for part, *_ in series],
        edges,
        stacked=True,
        color=[colour for _, colour, *_ in series],
        label=[label for *_, label in series],
    )
    after = "after, weighted" if found["weighted"] else "after"
    for when, style, words in (("before", ":", "before"), ("after", "-", after)):
        mean = found["attention"][when]["mean"]
        spread.axvline(mean, color=BLACK, linestyle=style, linewidth=1.8, label=f"mean {words}: {mean:.3f}")
    spread.set_ylabel("chains", fontsize=TEXT)
    spread.set_xlabel("attention to the image, of that to image and system turn", fontsize=TEXT)
    legend(spread, 2)
    step = max(1, len(rows) // POINTS)
    for part, colour, marker, label in series:
        shown = part.iloc[::step]
        length.scatter(
            shown["words"], shown["attention"], s=14, color=colour, marker=marker, linewidths=0.8, label=label
        )
    rho = found["spearman"]["words"]
    said = "length does not vary" if rho is None else f"Spearman's rho {rho:+.2f}"
    length.set_title(f"Attention and length: {said}", fontsize=TEXT, loc="left")
    length.set_xlabel("words of the chain", fontsize=TEXT)
    length.set_ylabel("attention", fontsize=TEXT)
    for axes in (spread, length):
        plain(axes)
    return figure
