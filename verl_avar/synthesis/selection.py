"""Which rows attention keeps, how they are weighted, and what that changes; functions of numbers alone.

verl 0.9.1's SFT has no weight per row: its dataset reads no such column and its loss is a mean over the batch's tokens
(verl/workers/utils/losses.py, `sft_loss`). Weights therefore reach training as repetition: `repeats` draws how often
each row is written, so that its expected number is its weight. The epoch stays as long as it was.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, repeat
from typing import Any

import numpy as np
import pandas as pd

RESAMPLES = 1000
DRAWN = 20_000_000  # rows drawn by a bootstrap in all: beyond 20,000 rows there are fewer resamples
FEWEST = 100  # resamples
NOISE = 1e-12  # what rounding makes of an interval without width
UNEVEN = 2.0  # kept shares of groups that differ by this factor are worth a word
QUANTILES = (0.05, 0.25, 0.75, 0.95)
MEASURE = "share of the response's attention to image and system turn that goes to the image: mean of v / (v + s)"


@dataclass(frozen=True)
class Selection:
    """Arrays of n rows."""

    kept: np.ndarray  # bool; rows that could not be measured are kept: unknown is not low
    weights: np.ndarray  # float64; 0 for rows that are not kept
    threshold: float | None  # the least attention of a kept row; None: nothing was measured


def select(ids: Sequence[Any], attention: np.ndarray, keep: float, weight: bool) -> Selection:
    """Keeps the share `keep` of measured rows with the most attention, ties in the order of their ids.

    attention: float [n], NaN where it could not be measured. Of m measured rows round(keep · m) are kept, at least
    one. Weights are 1; with `weight` those of kept measured rows are proportional to attention with mean 1.
    """
    attention = np.asarray(attention, dtype=float)
    kept = np.isnan(attention)
    weights = kept.astype(float)
    measured = np.flatnonzero(~kept)
    if not len(measured):
        return Selection(kept, weights, None)
    best = sorted(measured.tolist(), key=lambda row: (-attention[row], ids[row]))[: _number(keep, len(measured))]
    kept[best] = True
    mean = attention[best].mean()
    weights[best] = attention[best] / mean if weight and mean > 0 else 1.0
    return Selection(kept, weights, float(attention[best[-1]]))


def _number(keep: float, measured: int) -> int:
    return max(1, round(keep * measured))


def best(candidates: Sequence[tuple[str, float | None]]) -> int:
    """Which of a row's candidates (text, attention) has the most; the first of equals, and before unmeasured ones."""
    if not candidates:
        raise ValueError("best: no candidates")
    return max(range(len(candidates)), key=lambda i: -math.inf if (value := candidates[i][1]) is None else value)


def repeats(weights: Sequence[float], seed: int) -> list[int]:
    """How often each of n rows is written by systematic resampling: n in all, and each its weight rounded up or down.

    Weights count relative to their mean; one draw decides for all rows, so that the same seed gives the same numbers.
    Raises ValueError for a weight that is negative or not finite, and where all are 0.
    """
    weights = [float(weight) for weight in weights]
    if any(not math.isfinite(weight) or weight < 0 for weight in weights):
        raise ValueError("repeats: weights must be finite and not negative")
    total = math.fsum(weights)
    if weights and not total > 0:
        raise ValueError("repeats: all weights are 0")
    start, n = random.Random(f"repeats {seed}").random(), len(weights)
    # Points start, start + 1, …, start + n − 1 on a line of length n, on which each row has a piece of its weight.
    ends = [min(n, math.ceil(end * n / total - start)) for end in accumulate(weights)]
    last = max((row for row, weight in enumerate(weights) if weight), default=0)
    ends[last:] = [n] * (n - last)  # whatever rounding did to the sum
    return [end - before for before, end in zip([0, *ends], ends, strict=False)]


def resample(rows: Iterable[Any], weights: Sequence[float], seed: int) -> Iterator[Any]:
    """The rows, each as often as `repeats` says, one after the other."""
    return chain.from_iterable(map(repeat, rows, repeats(weights, seed)))


def report(rows: pd.DataFrame, keep: float, weight: bool, resamples: int = RESAMPLES, seed: int = 0) -> dict:
    """What selection changes, of plain JSON types.

    rows: a line for each row that reached selection, with `id`, `source`, `task` (or None), `words` and `anchors` of
    its chain, `attention` (NaN: not measured), `kept` and `weight`.

    `attention`, `words` and `anchors` have figures before and after, of measured rows (after: as weighted), and the
    `difference` of their means with its 95 % interval: percentile bootstrap over rows, each resample selected anew.
    `by_words_alone` is the difference in attention if the same share had been picked by length, in the direction in
    which length and attention go together.
    """
    measured = rows[rows["attention"].notna()]
    found = {
        "measure": MEASURE,
        "rows": len(rows),
        "measured": len(measured),
        "not_measured": len(rows) - len(measured),
        "kept": int(rows["kept"].sum()),
        "dropped": int((~rows["kept"]).sum()),
        "keep": keep,
        "weighted": weight,
    }
    if not len(measured):
        return found | {"notes": ["No chain could be measured: all rows are kept, with weight 1."]}
    columns = ("attention", "words", "anchors")
    values = measured[list(columns)].to_numpy(float)
    intervals = _intervals(values, keep, weight, resamples, seed)
    taken = measured[measured["kept"]]
    for column, interval in zip(columns, intervals, strict=True):
        before = _figures(measured[column].to_numpy(float), np.ones(len(measured)))
        after = _figures(taken[column].to_numpy(float), taken["weight"].to_numpy(float))
        change = {"difference": after["mean"] - before["mean"], "interval": interval}
        found[column] = {"before": before, "after": after, **change}
    found["spearman"] = {name: spearman(values[:, 0], values[:, i]) for i, name in ((1, "words"), (2, "anchors"))}
    found["by_words_alone"] = _by_words(values[:, 0], values[:, 1], found["spearman"]["words"], keep)
    found["by_source"] = _groups(rows, "source")
    found["by_task"] = _groups(rows, "task")
    return found | {"notes": _notes(found)}


def _figures(values: np.ndarray, weights: np.ndarray) -> dict:
    def quantile(q: float) -> float:
        return float(np.quantile(values, q, weights=weights, method="inverted_cdf"))

    figures = {"mean": float(np.average(values, weights=weights)), "median": quantile(0.5)}
    return figures | {f"q{round(100 * q):02d}": quantile(q) for q in QUANTILES}


def _intervals(values: np.ndarray, keep: float, weight: bool, resamples: int, seed: int) -> list[list[float] | None]:
    """Bootstrap intervals of the differences of means. values: [m, 3], attention first."""
    m, rng = len(values), np.random.default_rng(seed)
    if m < 2:
        return [None] * values.shape[1]
    differences = []
    for _ in range(min(resamples, max(FEWEST, DRAWN // m))):
        drawn = values[rng.integers(m, size=m)]
        # The order of equals has no effect on attention and is chance for the rest, as in the draw itself.
        top = drawn[np.argpartition(-drawn[:, 0], _number(keep, m) - 1)[: _number(keep, m)]]
        weights = top[:, 0] if weight and top[:, 0].sum() > 0 else None
        differences.append(np.average(top, axis=0, weights=weights) - drawn.mean(0))
    bounds = np.quantile(np.array(differences), [0.025, 0.975], axis=0).T
    return [[float(low), float(high)] if high - low > NOISE else None for low, high in bounds]


def spearman(first: np.ndarray, second: np.ndarray) -> float | None:
    """Rank correlation; None where one of the two does not vary."""
    from scipy.stats import spearmanr

    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(spearmanr(first, second).statistic)


def _by_words(attention: np.ndarray, words: np.ndarray, correlation: float | None, keep: float) -> float | None:
    if not correlation:
        return None
    order = np.argsort(-np.sign(correlation) * words, kind="stable")[: _number(keep, len(words))]
    return float(attention[order].mean() - attention.mean())


def _groups(rows: pd.DataFrame, column: str) -> list[dict]:
    """Rows, kept rows and their share by source or task, the least kept first."""
    groups = rows.dropna(subset=[column]).groupby(column)
    counted = [
        {
            "name": str(name),
            "rows": len(group),
            "kept": int(group["kept"].sum()),
            "kept_share": float(group["kept"].mean()),
            "weight": float(group["weight"].sum()),  # of the kept rows together
            "attention": None if group["attention"].isna().all() else float(group["attention"].mean()),
        }
        for name, group in groups
    ]
    return sorted(counted, key=lambda group: (group["kept_share"], group["name"]))


def _notes(found: dict) -> list[str]:
    notes = []
    if found["dropped"] or found["weighted"]:
        notes.append("Mean attention rises by construction: the interval says how much, not whether it does any good.")
    rho, alone = found["spearman"]["words"], found["by_words_alone"]
    if rho is not None:
        kind = "longer" if rho > 0 else "shorter"
        change = found["words"]["difference"]
        notes.append(
            f"Attention is confounded with length: Spearman's rho of attention and words is {rho:+.2f}, and selection "
            f"changes the mean chain by {change:+.1f} words. Picking the {kind} chains alone would change attention by "
            f"{alone or 0:+.4f}, of {found['attention']['difference']:+.4f}."
        )
    for column in ("source", "task"):
        groups = found[f"by_{column}"]
        if len(groups) > 1 and groups[-1]["kept_share"] > UNEVEN * groups[0]["kept_share"]:
            least, most = ((group["name"], group["kept_share"]) for group in (groups[0], groups[-1]))
            notes.append(
                f"The mix of {column}s changes: of {least[0]} {least[1]:.0%} are kept, of {most[0]} {most[1]:.0%}."
            )
    if found["not_measured"]:
        notes.append(f"Rows that could not be measured are kept with weight 1: {found['not_measured']}.")
    return notes
