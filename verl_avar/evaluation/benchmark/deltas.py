"""What a model gains on a benchmark over the re-run base, on the same questions, and how far chance explains it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from verl_avar.evaluation.paired import BATCH, FEWEST

if TYPE_CHECKING:
    import pandas as pd

RESAMPLES = 2000
LEVEL = 0.05
SET = ("category", "subcategory", "set_id")  # HallusionBench's questions that share figures and texts
GROUPS = ((*SET, "figure_id", "question_id"), (*SET, "figure_id"), (*SET, "question_id"))  # aAcc, fAcc, qAcc


def by_question(results: pd.DataFrame) -> pd.Series:
    """Share of right answers of each question over its repeats, by id; a call that failed counts as wrong."""
    return results["right"].eq(True).astype(float).groupby(results["id"], sort=True).mean()


def delta(
    own: pd.DataFrame, base: pd.DataFrame, metric: str = "accuracy", resamples: int = RESAMPLES, seed: int = 0
) -> dict:
    """One benchmark's difference between two models' results under one condition, over the questions of both.

    metric: accuracy; mmmu_pro, the mean of its standard and vision parts; hallusion, the mean of aAcc, fAcc and qAcc.
    Returns {"pairs", "value", "draws", "interval", "gained", "lost", "p"}: `value` is the difference of the metric, as
    a share; `draws` its bootstrap replicates, over questions or, for hallusion, over sets; `interval` their 95 %
    percentiles, None where they can't tell. `gained` and `lost` count questions whose share of right answers rose and
    fell, `p` is the exact test of these, McNemar's where each was answered once. value is None without pairs. Raises
    ValueError for another metric.
    """
    before, after = by_question(base), by_question(own)
    shared = before.index.intersection(after.index)
    if not len(shared):
        return {"pairs": 0, "value": None, "draws": None, "interval": None, "gained": 0, "lost": 0, "p": 1.0}
    new, old = (units(frame[frame["id"].isin(shared)], metric) for frame in (own, base))
    change = (after.loc[shared] - before.loc[shared]).to_numpy()
    draws = ratio_draws(new, resamples, seed) - ratio_draws(old, resamples, seed)  # the same units drawn of both
    draws = draws[np.isfinite(draws)]  # a resample may lack a part that the metric is over
    gained, lost = int((change > 0).sum()), int((change < 0).sum())
    return {
        "pairs": len(shared),
        "value": float(mean_ratio(new) - mean_ratio(old)),
        "draws": draws,
        "interval": percentiles(draws),
        "gained": gained,
        "lost": lost,
        "p": exact_p(gained, lost),
    }


def units(results: pd.DataFrame, metric: str) -> np.ndarray:
    """What is drawn together, with what the metric counts in it: [parts, 2, units], hits and their number.

    The metric is the mean over its parts of the sum of hits over the sum of numbers. Units are in the order of their
    keys, so that two models' results of the same questions have the same.
    """
    import pandas as pd

    if metric == "accuracy":
        right = by_question(results).to_numpy()
        return np.stack([right, np.ones_like(right)])[None]
    if metric not in ("mmmu_pro", "hallusion"):
        raise ValueError(f"no metric {metric}: one of accuracy, mmmu_pro, hallusion")
    meta = pd.DataFrame([json.loads(text or "{}") for text in results["meta"]], index=results.index)
    right = results["right"].eq(True).astype(float)
    if metric == "mmmu_pro":
        part = meta["part"].groupby(results["id"], sort=True).first()
        shares = by_question(results)
        return np.stack([np.stack([shares * (part == name), part == name]) for name in ("standard", "vision")])
    keys = meta[list(dict.fromkeys(key for group in GROUPS for key in group))].astype(str)
    parts = []
    for group in GROUPS:
        whole = right.groupby([results["repeat"], *(keys[key] for key in group)], sort=True).min()
        of_set = whole.groupby(level=list(SET), sort=True)
        parts.append(np.stack([of_set.sum(), of_set.size()]))
    return np.stack(parts).astype(float)


def mean_ratio(found: np.ndarray) -> np.ndarray:
    """The metric of units [parts, 2, …, units]; NaN where a part has none."""
    hits, counts = found.sum(-1).swapaxes(0, 1)
    with np.errstate(invalid="ignore"):
        return (hits / counts).mean(0)


def ratio_draws(found: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """The metric of bootstrap resamples of units [parts, 2, units]: [resamples]; the seed alone decides which units."""
    rng, n = np.random.default_rng(seed), found.shape[-1]
    rows = max(1, BATCH // n)
    sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    return np.concatenate([mean_ratio(found[..., rng.integers(n, size=(size, n))]) for size in sizes])


def exact_p(gained: int, lost: int) -> float:
    """Exact two-sided p that as many rise as fall; 1 where nothing changed."""
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def is_clear(found: Mapping) -> bool:
    """Whether a difference is beyond chance: by its interval, over FEWEST pairs or more, and by its corrected p where
    it has one."""
    bounds = found["interval"]
    apart = bounds is not None and (bounds[0] > 0 or bounds[1] < 0)
    return apart and found["pairs"] >= FEWEST and found.get("p_holm", 0.0) < LEVEL


def mean_draws(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means of bootstrap resamples of values [n]: [resamples]."""
    return ratio_draws(np.stack([values, np.ones_like(values)])[None], resamples, seed)


def percentiles(draws: np.ndarray) -> list[float] | None:
    """The 95 % interval of bootstrap replicates; None where all are alike, so that they can't tell."""
    if not len(draws):
        return None
    low, high = np.quantile(draws, [0.025, 0.975])
    return [float(low), float(high)] if high > low else None
