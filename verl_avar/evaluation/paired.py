"""What a sweep of the intervention shows: figures of each point, and differences to the baseline on the same samples.

Takes a table with one line per point and sample and knows nothing of models. Columns: `point` (its key), `number` (of
the sample), `right`, `well_formed` (bool), `tokens`, `cut` (bool), `queries`, and `vas`, `head_mean`, `visual` and
`system` over the response (NaN where there is none). A sample that broke at a point has no line there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

RESAMPLES = 2000
FEWEST = 6  # samples that a change can be told from chance by: if all 5 of 5 go one way, a sign test's p is 0.0625
BATCH = 1_000_000  # drawn values held at a time, of each array
PROPORTIONS = {"accuracy": "right", "format": "well_formed"}
# Every response counts by its queries in attention figures, as in `avar vas`.
MEANS = {"tokens": None, "vas": "queries", "head_mean": "queries", "visual": "queries", "system": "queries"}


def compare(
    table: pd.DataFrame, points: Sequence[str], baseline: str, resamples: int = RESAMPLES, seed: int = 0
) -> list:
    """Figures of each point of the sweep, in order.

    Each is {"point", "samples", "cut", "pairs"} and the figures accuracy, format, tokens, vas, head_mean, visual and
    system: `pairs` counts the samples that the baseline has too, `cut` the responses that hit the limit. A figure is
    {"value", "interval", "difference", "difference_interval"}, None where nothing was measured, and "clear": whether
    the difference is one beyond chance, over at least FEWEST pairs whose interval leaves out 0, or all of which
    changed alike. Accuracy has also `gained`, `lost` (answers that became right, wrong), `p` (McNemar's exact test of
    these) and `p_holm` (corrected for the number of points).

    Intervals are [low, high] at 95 %: Wilson's for proportions, which a bootstrap would call certain at 0 and 1; for
    other means and for all differences the percentile bootstrap over samples, each drawn with both of its measurements.
    An interval is None for fewer than two samples, and where all of them are alike so that a bootstrap can't tell.
    """
    base = table[table["point"] == baseline].set_index("number")
    found = []
    for point in points:
        own = table[table["point"] == point].set_index("number")
        shared = own.index.intersection(base.index)
        before, after = (None, None) if point == baseline else (base.loc[shared], own.loc[shared])
        rng = np.random.default_rng(seed)
        figures = {
            "point": point,
            "samples": len(own),
            "cut": int(own["cut"].sum()),
            "pairs": len(shared),
        }
        for name, column in PROPORTIONS.items():
            figures[name] = _figure(own, before, after, column, None, resamples, rng, proportion=True)
        for name, weights in MEANS.items():
            figures[name] = _figure(own, before, after, name, weights, resamples, rng)
        if len(shared) and point != baseline:
            figures["accuracy"] |= mcnemar(before["right"], after["right"])
        found.append(figures)
    tested = [figures["accuracy"] for figures in found if "p" in figures["accuracy"]]
    for accuracy, p in zip(tested, holm([accuracy["p"] for accuracy in tested]), strict=True):
        accuracy["p_holm"] = p
    return found


def _figure(own, before, after, column: str, weights: str | None, resamples: int, rng, proportion=False) -> dict:
    """Mean of one column at a point, and its difference to the baseline over the pairs that both have it."""

    def arrays(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        values = frame[column].to_numpy(float)
        return values, np.ones_like(values) if weights is None else frame[weights].to_numpy(float)

    values, counts = arrays(own)
    measured = np.isfinite(values)
    own_arrays = values[measured], counts[measured]
    figure = {"value": None, "interval": None, "difference": None, "difference_interval": None, "clear": False}
    if measured.any():
        figure["value"] = float(_mean(*own_arrays))
        if proportion:
            figure["interval"] = wilson(int(values.sum()), len(values))
        else:
            figure["interval"] = bootstrap_interval(own_arrays, _mean, resamples, rng)
    if before is not None:
        (new, new_counts), (old, old_counts) = arrays(after), arrays(before)
        both = np.isfinite(new) & np.isfinite(old)
        if both.any():
            pairs = new[both], new_counts[both], old[both], old_counts[both]
            figure["difference"] = float(_difference(*pairs))
            bounds = bootstrap_interval(pairs, _difference, resamples, rng)
            figure["difference_interval"] = bounds
            apart = figure["difference"] != 0 if bounds is None else bounds[0] > 0 or bounds[1] < 0
            figure["clear"] = bool(apart) and int(both.sum()) >= FEWEST
    return figure


def _mean(values, weights, axis=-1):
    return (values * weights).sum(axis) / weights.sum(axis)


def _difference(new, new_weights, old, old_weights, axis=-1):
    return _mean(new, new_weights, axis) - _mean(old, old_weights, axis)


def bootstrap_interval(samples: Sequence[np.ndarray], statistic, resamples: int, rng) -> list[float] | None:
    """95 % percentile bootstrap interval of a statistic of arrays whose entries belong together; None: can't tell."""
    from scipy.stats import bootstrap

    if len(samples[0]) < 2:
        return None
    found = bootstrap(
        tuple(samples),
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, BATCH // len(samples[0])),
        method="percentile",
        rng=rng,
    ).confidence_interval
    return [float(found.low), float(found.high)] if found.high > found.low else None


def wilson(hits: int, n: int) -> list[float] | None:
    """Wilson's 95 % interval of a proportion; None for no samples."""
    from scipy.stats import binomtest

    if n == 0:
        return None
    found = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    return [float(found.low), float(found.high)]


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> dict:
    """Exact McNemar test on pairs: {"gained", "lost", "p"}; p = 1 where no pair differs."""
    from scipy.stats import binomtest

    before, after = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return {"gained": gained, "lost": lost, "p": p}


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction of p-values for their number n: the smallest times n, the next times n − 1, …"""
    order, corrected, running = np.argsort(p_values, kind="stable"), [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = running
    return corrected
