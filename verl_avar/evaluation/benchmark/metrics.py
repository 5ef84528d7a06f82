"""Figures of benchmarks from results: accuracies with 95 % intervals, as each benchmark's publisher defines them.

HallusionBench (Guan et al., arXiv:2310.14566) has three: aAcc over questions, fAcc over figures, right where all
questions about one figure are, qAcc over question pairs, right where one question is for all of its figures. A figure
is (category, subcategory, set_id, figure_id), a pair (category, subcategory, set_id, question_id): the 951 questions
with an image have 346 figures and 455 pairs. (Without the category, 332 and 429: `ocr` is in both.) VLMEvalKit's
column and OpenCompass' leaderboard are the mean of the three, which is what published tables of models print: of
Qwen2.5-VL-7B about 51 to 56, where its aAcc is 71.8, fAcc 48.0 and qAcc 47.3 (VLMEvalKit issue 825). That mean is the
main figure here. The 178 questions without an image are no part of it; upstream's own script counts them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from verl_avar.evaluation.benchmark.schema import PLAIN
from verl_avar.evaluation.paired import RESAMPLES, bootstrap_interval, wilson

if TYPE_CHECKING:
    import pandas as pd

# What of `meta` figures are given by; a list's members each count.
BY = (
    "category", "subcategory", "part", "field", "subfield", "task", "skills", "grade", "difficulty", "level", "language"
)  # fmt: skip
METRICS = ("accuracy", "hallusion", "mmmu_pro")
HALLUSION_KEYS = ("category", "subcategory", "set_id", "figure_id", "question_id")
PARTS = ("standard", "vision")  # of MMMU-Pro
RATES = ("truncated", "format", "failed")


def figures(
    results: pd.DataFrame,
    metrics: Mapping[str, str] | None = None,
    condition: str = PLAIN,
    by: Sequence[str] = BY,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, dict]:
    """Figures of each benchmark in results (schema.RESULTS) under one condition, as fractions of 1.

    metrics: METRICS by benchmark; without, "hallusion" and "mmmu_pro" by the names hallusionbench and mmmu_pro. An
    accuracy is the mean over repeats, then over questions; a failed response counts as wrong. Of a benchmark:

        {"metric", "questions", "repeats", "main", "accuracy", …,   main is what its column in a table shows
         "rates": {problem: share of responses, with all of RATES}, "failed": responses that never came,
         "subsets": {key of `by`: {value: accuracy}}}

    An accuracy is {"value", "interval", "questions"}. hallusion adds aAcc, fAcc, qAcc (main: their mean), mmmu_pro
    standard and vision (main: their mean). Intervals: Wilson's over questions answered once; a bootstrap over
    questions where they were repeated; over sets for hallusion, whose figures and pairs share questions. None: can't
    tell. main is None with "missing" where a part has no results. Raises ValueError for a metric that is none, and
    for results without the columns that their metric groups by.
    """
    found = {}
    chosen = results[results["condition"] == condition]
    for name, rows in chosen.groupby("benchmark", sort=False):
        metric = (metrics or {"hallusionbench": "hallusion", "mmmu_pro": "mmmu_pro"}).get(name, "accuracy")
        if metric not in METRICS:
            raise ValueError(f"{name}: no metric {metric}; one of {', '.join(METRICS)}")
        rng = np.random.default_rng(seed)
        questions = _questions(rows)
        problems = rows["problem"].dropna()
        of = {
            "metric": metric,
            "questions": len(questions),
            "repeats": int(rows.groupby("id").size().max()),
            "accuracy": accuracy(questions, resamples, rng),
            "rates": dict.fromkeys(RATES, 0.0)
            | {k: float(v) for k, v in (problems.value_counts() / len(rows)).items()},
            "failed": int(rows["response"].isna().sum()),
            "subsets": _subsets(questions, by, resamples, rng),
        }
        of["main"] = of["accuracy"]
        if metric == "hallusion":
            of |= hallusion(questions, resamples, rng)
        elif metric == "mmmu_pro":
            of |= _mmmu_pro(questions, resamples, rng)
        found[name] = of
    return found


def suite_average(
    found: Mapping[str, dict], suite: Sequence[str], expected: Mapping[str, int] | None = None
) -> tuple[float | None, list[str]]:
    """(mean of the main figures of a suite's benchmarks, those that are missing or not whole); None unless all are.

    found: as `figures` gives it. expected: questions that a benchmark has, by its name.
    """
    missing = []
    for name in suite:
        if name not in found or found[name]["main"] is None:
            missing.append(name)
        elif found[name]["questions"] != (expected or {}).get(name, found[name]["questions"]):
            missing.append(f"{name} ({found[name]['questions']} of {expected[name]} questions)")
    return (None if missing else float(np.mean([found[name]["main"]["value"] for name in suite]))), missing


def _questions(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a question: its meta, `right` as the repeats' verdicts in order, `hits` as their mean."""
    import pandas as pd

    ordered = rows.sort_values("repeat", kind="stable")
    right = ordered["right"].fillna(False).astype(bool)
    grouped = ordered.assign(right=right).groupby("id", sort=False)
    meta = [json.loads(text or "{}") for text in grouped["meta"].first()]
    return pd.DataFrame({"meta": meta, "right": list(grouped["right"].apply(tuple)), "hits": grouped["right"].mean()})


def accuracy(questions: pd.DataFrame, resamples: int, rng: np.random.Generator) -> dict:
    """{"value", "interval", "questions"} of `_questions`."""
    hits = questions["hits"].to_numpy(float)
    if (questions["right"].map(len) == 1).all():
        interval = wilson(int(hits.sum()), len(hits))
    else:
        interval = bootstrap_interval((hits,), lambda values, axis=-1: values.mean(axis), resamples, rng)
    return {"value": float(hits.mean()), "interval": interval, "questions": len(hits)}


def _subsets(questions: pd.DataFrame, by: Sequence[str], resamples: int, rng) -> dict[str, dict[str, dict]]:
    found = {}
    for key in by:
        members: dict[str, list[int]] = {}
        for row, meta in enumerate(questions["meta"]):
            values = meta.get(key)
            for value in values if isinstance(values, list) else [values]:
                if value not in (None, ""):
                    members.setdefault(str(value), []).append(row)
        if members:
            found[key] = {v: accuracy(questions.iloc[rows], resamples, rng) for v, rows in sorted(members.items())}
    return found


def hallusion(questions: pd.DataFrame, resamples: int, rng: np.random.Generator) -> dict[str, dict]:
    """aAcc, fAcc, qAcc and main, their mean; of repeats the mean, each repeat being grouped by itself."""
    import pandas as pd

    keys = pd.DataFrame([{key: str(meta.get(key)) for key in HALLUSION_KEYS} for meta in questions["meta"]])
    lacking = [key for key in HALLUSION_KEYS if (keys[key] == "None").any()]
    if lacking:
        raise ValueError(f"hallusion: questions without {', '.join(lacking)} in `meta`")
    repeats = questions["right"].map(len).min()
    in_set = ["category", "subcategory", "set_id"]
    parts = {"aAcc": HALLUSION_KEYS, "fAcc": [*in_set, "figure_id"], "qAcc": [*in_set, "question_id"]}
    found, columns = {}, []
    for name, by in parts.items():
        hits = 0
        for repeat in range(repeats):
            right = np.array([verdicts[repeat] for verdicts in questions["right"]])
            hits = hits + keys.assign(right=right).groupby(list(by), sort=True)["right"].all().astype(float)
        of_sets = (hits / repeats).groupby(level=in_set, sort=True)
        columns += [of_sets.sum().to_numpy(), of_sets.size().to_numpy(float)]
        interval = bootstrap_interval(columns[-2:], _share, resamples, rng)
        found[name] = {"value": float(_share(*columns[-2:])), "interval": interval, "groups": len(hits)}
    interval = bootstrap_interval(columns, _mean_share, resamples, rng)
    return found | {"main": {"value": float(_mean_share(*columns)), "interval": interval, "questions": len(questions)}}


def _share(hits, counts, axis=-1):
    return hits.sum(axis) / counts.sum(axis)


def _mean_share(*columns, axis=-1):
    pairs = zip(columns[::2], columns[1::2], strict=True)
    return sum(_share(hits, counts, axis) for hits, counts in pairs) / (len(columns) // 2)


def _mmmu_pro(questions: pd.DataFrame, resamples: int, rng: np.random.Generator) -> dict:
    """standard, vision and main, their mean. Its interval draws each part's questions by themselves."""
    part = questions["meta"].map(lambda meta: meta.get("part"))
    hits = {name: questions[part == name] for name in PARTS}
    missing = [name for name in PARTS if hits[name].empty]
    found = {name: accuracy(rows, resamples, rng) for name, rows in hits.items() if name not in missing}
    if missing:
        return found | {"main": None, "missing": missing}
    draws = np.zeros(resamples)
    for rows in hits.values():
        values = rows["hits"].to_numpy(float)
        draws += [rng.choice(values, len(values)).mean() / len(PARTS) for _ in range(resamples)]
    low, high = np.quantile(draws, [0.025, 0.975])
    value = float(np.mean([found[name]["value"] for name in PARTS]))
    interval = [float(low), float(high)] if high > low else None
    return found | {"main": {"value": value, "interval": interval, "questions": len(questions)}}
