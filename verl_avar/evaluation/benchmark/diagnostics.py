"""What tells "looks more" from "answers better": controls without the image, the bias sweep, and VAS beside accuracy.

VAS figures are over the first of the repeats. "Right" is per question: metrics over groups of questions have no share
in them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from verl_avar.evaluation.benchmark.conditions import blackout_share
from verl_avar.evaluation.benchmark.deltas import RESAMPLES, by_question, mean_draws, percentiles
from verl_avar.evaluation.benchmark.runs import Run
from verl_avar.evaluation.benchmark.schema import CONTROLS, PLAIN
from verl_avar.evaluation.paired import wilson

if TYPE_CHECKING:
    import pandas as pd

ALL = "all"
PARTS = 5  # quintiles
BINS = 20  # along a response
FEWEST_EACH = 5  # answers of a kind from which their VAS is described
BIAS = re.compile(r"visual_bias=([-+]?[\d.]+(?:[eE][-+]?\d+)?)")


def controls_of(run: Run) -> list[str]:
    """The controls that were run, in the schema's order."""
    known = set(run.results["condition"])
    return [name for name in CONTROLS if name in known]


def beside_plain(run: Run, condition: str, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, dict]:
    """A condition beside the plain question, by benchmark and over ALL questions, on those answered both ways.

    Each is {"pairs", "plain", "value", "difference", "interval"}: shares of right answers, `difference` is the
    condition's less the plain one's, with its paired bootstrap interval (95 %, None: can't tell).
    """
    changed, plain = run.of(condition), run.of(PLAIN)
    found, all_pairs = {}, []
    for name in run.titles:
        after, before = (by_question(part[part["benchmark"] == name]) for part in (changed, plain))
        shared = after.index.intersection(before.index)
        if len(shared):
            pair = np.stack([before.loc[shared].to_numpy(), after.loc[shared].to_numpy()])
            all_pairs.append(pair)
            found[name] = _pair(pair, resamples, seed)
    if all_pairs:
        found[ALL] = _pair(np.concatenate(all_pairs, axis=1), resamples, seed)
    return found


def _pair(pair: np.ndarray, resamples: int, seed: int) -> dict:
    before, after = pair
    draws = mean_draws(after - before, resamples, seed)
    plain, value = float(before.mean()), float(after.mean())
    return {"pairs": pair.shape[1], "plain": plain, "value": value, "difference": value - plain,
            "interval": percentiles(draws)}  # fmt: skip


def bias_points(run: Run, resamples: int = RESAMPLES, seed: int = 0) -> list[tuple[float, dict]]:
    """(β, figures over ALL questions as in `beside_plain`) of each visual bias, weakest first, β = 0 the plain one."""
    biases = {float(match[1]): name for name in set(run.results["condition"]) if (match := BIAS.fullmatch(name))}
    points = [(beta, found[ALL]) for beta, name in biases.items()
              if ALL in (found := beside_plain(run, name, resamples, seed))]  # fmt: skip
    if points and 0.0 not in biases:
        right = by_question(_keyed(run.of(PLAIN)))
        plain = float(right.mean())
        points.append((0.0, {"pairs": len(right), "plain": plain, "value": plain, "difference": 0.0, "interval": None}))
    return sorted(points, key=lambda point: point[0])


def blackout_points(run: Run, resamples: int = RESAMPLES, seed: int = 0) -> list[tuple[float, dict]]:
    """(share of the image that is black, figures over ALL questions as in `beside_plain`), the least first; share 0 is
    the plain questions.

    Beside them `own`: the interval of `value` itself (95 %, by drawing questions; None: can't tell). `interval` is the
    paired one of the difference. [] where `blackout` alone was run, which is a control and no curve.
    """
    conditions = sorted(set(run.results["condition"]))
    shares = {share: name for name in conditions if (share := blackout_share(name)) is not None}
    if not any(name != "blackout" for name in shares.values()):
        return []
    points = []
    for share, name in shares.items():
        if share and ALL in (found := beside_plain(run, name, resamples, seed)):
            points.append((share, found[ALL] | {"own": own_interval(run, name, resamples, seed)}))
    if points:
        right = by_question(_keyed(run.of(PLAIN)))
        plain = float(right.mean())
        whole = {"pairs": len(right), "plain": plain, "value": plain, "difference": 0.0, "interval": None}
        points.append((0.0, whole | {"own": own_interval(run, PLAIN, resamples, seed)}))
    return sorted(points, key=lambda point: point[0])


def own_interval(run: Run, condition: str = PLAIN, resamples: int = RESAMPLES, seed: int = 0) -> list[float] | None:
    """The interval of the share of right answers under a condition, over all questions: 95 %, None: can't tell."""
    return percentiles(mean_draws(by_question(_keyed(run.of(condition))).to_numpy(), resamples, seed))


def _keyed(results: pd.DataFrame) -> pd.DataFrame:
    """Results of several benchmarks with ids that differ between them."""
    return results.assign(id=results["benchmark"] + "\0" + results["id"])


def guessing(questions: Sequence[Mapping]) -> float:
    """Share that blind guessing gets right: one of the choices, one of yes and no, nothing for open questions."""
    chances = [1 / len(q["choices"]) if len(q["choices"]) else 0.5 if q["answer_type"] == "yes_no" else 0.0
               for q in questions]  # fmt: skip
    return float(np.mean(chances)) if chances else 0.0


def measured(run: Run) -> pd.DataFrame:
    """Plain answers with a VAS and a judgement, of the first repeat, with `part`: which fifth by VAS of its benchmark.

    `part` is 0 (looks least) to PARTS − 1; equal values share one.
    """
    plain = run.of(PLAIN)
    plain = plain[(plain["repeat"] == 0) & plain["vas"].notna() & plain["right"].notna()]
    rank = plain.groupby("benchmark")["vas"].rank(pct=True)
    return plain.assign(right=plain["right"].astype(bool), part=np.ceil(rank * PARTS).astype(int) - 1)


def by_part(answers: pd.DataFrame) -> list[dict | None]:
    """Of each fifth by VAS: {"n", "value" (share right), "interval" (Wilson's), "tokens" (mean)}; None: empty."""
    found = []
    for number in range(PARTS):
        part = answers[answers["part"] == number]
        hits, n = int(part["right"].sum()), len(part)
        tokens = float(part["completion_tokens"].mean()) if n else None
        found.append({"n": n, "value": hits / n, "interval": wilson(hits, n), "tokens": tokens} if n else None)
    return found


def halves(answers: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The shorter and the longer half of the responses of each benchmark, each divided by VAS anew."""
    rank = answers.groupby("benchmark")["completion_tokens"].rank(pct=True)
    parts = answers[rank <= 0.5], answers[rank > 0.5]
    within = [part.groupby("benchmark")["vas"].rank(pct=True) for part in parts]
    short, long = (part.assign(part=np.ceil(rank * PARTS).astype(int) - 1)
                   for part, rank in zip(parts, within, strict=True))  # fmt: skip
    return short, long


def right_and_wrong(answers: pd.DataFrame) -> dict[str, dict]:
    """By benchmark: {"right", "wrong"}: quartiles of VAS [3]; "auc": how often a right answer's VAS is above a wrong
    one's; benchmarks with fewer than FEWEST_EACH of either are left out."""
    from scipy.stats import mannwhitneyu

    found = {}
    for name, part in answers.groupby("benchmark"):
        right, wrong = (part.loc[part["right"] == kind, "vas"].to_numpy(float) for kind in (True, False))
        if min(len(right), len(wrong)) >= FEWEST_EACH:
            auc = float(mannwhitneyu(right, wrong).statistic) / (len(right) * len(wrong))
            quartiles = {"right": np.quantile(right, [0.25, 0.5, 0.75]), "wrong": np.quantile(wrong, [0.25, 0.5, 0.75])}
            found[name] = quartiles | {"auc": auc}
    return found


def length_correlation(answers: pd.DataFrame) -> float | None:
    """Spearman's ρ of VAS and response length, of ranks within each benchmark; None where either does not vary."""
    ranks = answers.groupby("benchmark")[["vas", "completion_tokens"]].rank(pct=True).dropna()
    if len(ranks) < 3 or (ranks.nunique() < 2).any():
        return None
    return float(np.corrcoef(ranks["vas"], ranks["completion_tokens"])[0, 1])


def along(run: Run) -> tuple[np.ndarray, int] | None:
    """Mean visual ratio of BINS equal parts of the responses [BINS], and of how many; None: not asked for.

    Responses shorter than BINS tokens are left out: they have no such parts.
    """
    rows = [np.asarray(one, dtype=float) for one in run.of(PLAIN)["attention_tokens"] if one is not None]
    rows = [row for row in rows if len(row) >= BINS and np.isfinite(row).all()]
    if not rows:
        return None
    return np.mean([[part.mean() for part in np.array_split(row, BINS)] for row in rows], axis=0), len(rows)
