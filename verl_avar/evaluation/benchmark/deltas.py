"""What a model gains on a benchmark over the re-run base, on the same questions, and how far chance explains it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from verl_avar.evaluation.paired import BATCH, FEWEST

if TYPE_CHECKING:
    import pandas as pd

RESAMPLES = 2000
GROUPED = 400  # resamples of metrics over groups of questions, each of which is computed anew
GROUPS = ("category", "subcategory", "set_id")  # of meta: questions that such a metric judges together
LEVEL = 0.05

Figures = Callable[["pd.DataFrame"], Mapping[str, Mapping]]


def by_question(results: pd.DataFrame) -> pd.Series:
    """Share of right answers of each question over its repeats, by id; questions without any answer are left out."""
    answered = results[results["right"].notna()]
    return answered["right"].astype(float).groupby(answered["id"], sort=True).mean()


def delta(own: pd.DataFrame, base: pd.DataFrame, figures: Figures, resamples: int = RESAMPLES, seed: int = 0) -> dict:
    """One benchmark's difference between two models' results under one condition, over the questions both answered.

    Returns {"pairs", "value", "draws", "interval", "gained", "lost", "p"}: `value` is the difference of the
    benchmark's own metric on these questions, as a share; `draws` its bootstrap replicates over questions (over groups
    of questions for a metric that judges them together), `interval` their 95 % percentiles, None where they can't
    tell. `gained` and `lost` count questions whose share of right answers rose and fell, `p` is the exact test of
    these, McNemar's where each was answered once. value is None without pairs.
    """
    before, after = by_question(base), by_question(own)
    shared = before.index.intersection(after.index)
    if not len(shared):
        return {"pairs": 0, "value": None, "draws": None, "interval": None, "gained": 0, "lost": 0, "p": 1.0}
    change = (after.loc[shared] - before.loc[shared]).to_numpy()
    pairs = [part[part["id"].isin(shared) & part["right"].notna()] for part in (own, base)]
    new, old = (_value(part, figures) for part in pairs)
    rng = np.random.default_rng(seed)
    if np.isclose(new - old, change.mean(), atol=1e-9, rtol=0) and np.isclose(new, after.loc[shared].mean()):
        draws = mean_draws(change, resamples, rng)
    else:
        draws = _grouped_draws(*pairs, figures, min(resamples, GROUPED), rng)
    gained, lost = int((change > 0).sum()), int((change < 0).sum())
    return {
        "pairs": len(shared),
        "value": new - old,
        "draws": draws,
        "interval": percentiles(draws),
        "gained": gained,
        "lost": lost,
        "p": exact_p(gained, lost),
    }


def exact_p(gained: int, lost: int) -> float:
    """Exact two-sided p that as many rise as fall; 1 where nothing changed."""
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def is_clear(found: Mapping) -> bool:
    """Whether a difference is beyond chance: by its interval, by its corrected p, and over FEWEST pairs or more."""
    bounds = found["interval"]
    apart = bounds is not None and (bounds[0] > 0 or bounds[1] < 0)
    return apart and found["pairs"] >= FEWEST and found.get("p_holm", found["p"]) < LEVEL


def mean_draws(values: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means of bootstrap resamples of values [n]: [resamples]."""
    rows = max(1, BATCH // len(values))
    parts = [
        values[rng.integers(len(values), size=(min(rows, resamples - start), len(values)))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    return np.concatenate(parts)


def percentiles(draws: np.ndarray) -> list[float] | None:
    """The 95 % interval of bootstrap replicates; None where all are alike, so that they can't tell."""
    if not len(draws):
        return None
    low, high = np.quantile(draws, [0.025, 0.975])
    return [float(low), float(high)] if high > low else None


def _value(results: pd.DataFrame, figures: Figures) -> float:
    (found,) = figures(results).values()
    return np.nan if found["value"] is None else float(found["value"])


def _grouped_draws(own, base, figures: Figures, resamples: int, rng) -> np.ndarray:
    """Differences of a metric over resampled groups of questions; a group drawn twice counts as two groups."""
    sides = [(frame.reset_index(drop=True), _rows_by_group(frame), {}) for frame in (own, base)]
    groups = sorted(set().union(*(rows for _, rows, _ in sides)))
    draws = []
    for _ in range(resamples):
        drawn = [groups[i] for i in rng.integers(len(groups), size=len(groups))]
        new, old = (_value(_resampled(*side, drawn), figures) for side in sides)
        draws.append(new - old)
    found = np.array(draws)
    return found[np.isfinite(found)]  # a resample may lack a part that the metric is over


def _rows_by_group(frame: pd.DataFrame) -> dict[str, list[int]]:
    """Positions of the rows of each group: what meta names, else the question alone."""
    found: dict[str, list[int]] = {}
    for at, (meta, question) in enumerate(zip(frame["meta"], frame["id"], strict=True)):
        known = json.loads(meta or "{}")
        key = json.dumps([known.get(name) for name in GROUPS]) if "set_id" in known else question
        found.setdefault(key, []).append(at)
    return found


def _resampled(frame: pd.DataFrame, rows: Mapping, renamed: dict, drawn: list[str]) -> pd.DataFrame:
    """The rows of the drawn groups. Copies get names of their own; `renamed` keeps these from one draw to the next."""
    seen: Counter[str] = Counter()
    positions, names = [], []
    for key in drawn:
        copy, seen[key] = seen[key], seen[key] + 1
        for at in rows.get(key, ()):
            if (at, copy) not in renamed:
                renamed[at, copy] = f"{frame['id'][at]}#{copy}", _renamed(frame["meta"][at], copy)
            positions.append(at)
            names.append(renamed[at, copy])
    ids, metas = zip(*names, strict=True) if names else ((), ())
    return frame.take(positions).assign(id=list(ids), meta=list(metas))


def _renamed(meta: str | None, copy: int) -> str | None:
    known = json.loads(meta or "{}")
    return json.dumps(known | {"set_id": f"{known['set_id']}#{copy}"}) if "set_id" in known else meta
