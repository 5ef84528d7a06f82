"""Does VAS go with accuracy over checkpoints? Pearson, Spearman, their uncertainty, and a line (AVAR §2.2).

The paper reports r = 0.9616 over ten models (arXiv:2603.03825). The VAS of four stages of its own training is published
too; these points ship with the package.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from verl_avar.evaluation.points import MEASURES, SCOPES, Point, published_points, read_points

RESAMPLES = 9999
EXACT = 8  # points up to which Spearman's p is counted over all n! orders
FEW = 10  # points below which the findings warn of their own intervals
PAPER = "The paper's own claim, over ten models: r = 0.9616, p = 9.0e-6 (arXiv:2603.03825)."


def correlate(points: Sequence[Point], resamples: int = RESAMPLES, seed: int = 0) -> dict:
    """Correlation of VAS and accuracy over points.

    Returns {"points": n, "pearson": {"r", "p", "interval", "fisher_interval"}, "spearman": {"rho", "p", "method"},
    "line": {"slope", "intercept", "slope_error"} of accuracy on VAS, "bootstrap": {"resamples", "undefined",
    "two_points", "seed"}}. Intervals are [low, high] at 95 %.

    `interval` is the percentile bootstrap over points. A resample of one point only, or of equal values, has no
    correlation: such are left out and counted (`undefined`). One of two distinct points has |r| = 1 whatever they are;
    `two_points` is the share of those to expect. `fisher_interval` is Fisher's, which takes values for normal.
    Spearman's p is exact over all orders up to 8 points, where the usual approximation is far too small.
    Raises ValueError for fewer than 3 different points, values that are not finite, and values that are all equal.
    """
    import numpy as np
    from scipy import stats

    n = len(points)
    if n < 3:
        raise ValueError(f"a correlation needs at least 3 points, got {n}: any two lie on a line")
    vas, accuracy = (np.array([getattr(point, key) for point in points], dtype=float) for key in ("vas", "accuracy"))
    for what, values in (("VAS", vas), ("accuracy", accuracy)):
        if bad := [point.name for point, value in zip(points, values, strict=True) if not math.isfinite(value)]:
            raise ValueError(f"the {what} of '{bad[0]}' is not a finite number")
        if np.ptp(values) == 0:
            raise ValueError(f"all {n} points have the same {what}, {values[0]:g}: no correlation is defined")
    if len(set(zip(vas, accuracy, strict=True))) < 3:
        raise ValueError(f"{n} points, but only two different ones: any two lie on a line")
    pearson, line = stats.pearsonr(vas, accuracy), stats.linregress(vas, accuracy)
    with warnings.catch_warnings():  # of the resamples without a correlation, which are counted instead
        warnings.simplefilter("ignore", (stats.ConstantInputWarning, stats.NearConstantInputWarning))
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        drawn = stats.bootstrap(
            (vas, accuracy),
            lambda x, y, axis=-1: stats.pearsonr(x, y, axis=axis).statistic,
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).bootstrap_distribution
    defined = drawn[np.isfinite(drawn)]
    rho, p, method = _spearman(vas, accuracy)
    return {
        "points": n,
        "pearson": {
            "r": float(pearson.statistic),
            "p": float(pearson.pvalue),
            "interval": np.quantile(defined, [0.025, 0.975]).tolist(),
            "fisher_interval": [float(bound) for bound in pearson.confidence_interval(0.95)],
        },
        "spearman": {"rho": rho, "p": p, "method": method},
        "line": {
            "slope": float(line.slope),
            "intercept": float(line.intercept),
            "slope_error": float(line.stderr),
        },
        "bootstrap": {
            "resamples": resamples,
            "undefined": int(len(drawn) - len(defined)),
            "two_points": math.comb(n, 2) * (2**n - 2) / n**n,
            "seed": seed,
        },
    }


def _spearman(vas, accuracy) -> tuple[float, float, str]:
    """Spearman's ρ, its two-sided p-value and how that was found."""
    import numpy as np
    from scipy import stats

    result = stats.spearmanr(vas, accuracy)
    if len(vas) > EXACT:
        return float(result.statistic), float(result.pvalue), "t approximation"
    x, y = (stats.rankdata(values) - (len(values) + 1) / 2 for values in (vas, accuracy))
    # Σxy orders the permutations as ρ does: means and variances of the ranks stay.
    exact = stats.permutation_test(
        (x,),
        lambda order, axis=-1: (order * y).sum(axis=axis),
        permutation_type="pairings",
        vectorized=True,
        n_resamples=np.inf,
    )
    return float(result.statistic), float(exact.pvalue), "exact, all orders"


def findings(statistics: dict, published: bool = False) -> list[str]:
    """What the statistics say, in plain lines, and how far to trust them."""
    n, pearson, spearman = statistics["points"], statistics["pearson"], statistics["spearman"]
    low, high = pearson["interval"]
    fisher_low, fisher_high = pearson["fisher_interval"]
    lines = [
        f"{n} points: Pearson's r = {pearson['r']:.3f} (p = {pearson['p']:.2g}), 95 % interval {low:.3f} to {high:.3f} "
        f"by bootstrap, {fisher_low:.3f} to {fisher_high:.3f} by Fisher's formula.",
        f"Spearman's ρ = {spearman['rho']:.3f} (p = {spearman['p']:.2g}, {spearman['method']}).",
        f"One more of VAS goes with {statistics['line']['slope']:+.3g} of accuracy "
        f"(± {statistics['line']['slope_error']:.2g}, standard error).",
    ]
    if pearson["p"] >= 0.05:
        lines.append("No correlation beyond chance was found at the 5 % level.")
    if n < FEW:
        bootstrap = statistics["bootstrap"]
        lines.append(
            f"{n} points are few and an interval from so few says little: the bootstrap only redraws them "
            f"({bootstrap['undefined']} of {bootstrap['resamples']:,} resamples had no correlation and were left out; "
            f"in {100 * bootstrap['two_points']:.2g} % two points force |r| = 1)."
        )
    if published:
        lines.append(
            "The published points are stages of one training run, in order: accuracy and VAS both rise along it, "
            "and the points are not independent."
        )
    return [*lines, PAPER]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `avar correlate`."""
    parser.add_argument(
        "points",
        nargs="*",
        metavar="POINT",
        help="[NAME:]path/to/vas.json=ACCURACY, or a CSV file with the columns name,vas,accuracy "
        "(or name,vas_json,accuracy)",
    )
    parser.add_argument("--published", action="store_true", help="add the four stages that the paper publishes")
    parser.add_argument(
        "--scope", choices=SCOPES, default="user", help="whose VAS to read from vas.json (default: user, the paper's)"
    )
    parser.add_argument(
        "--measure",
        choices=MEASURES,
        default="vas",
        help="vas: the paper's mean of ratios (default); head_mean: after averaging heads; median: over queries",
    )
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write correlation.json and correlation.png there")


def run(arguments: argparse.Namespace) -> int:
    """Runs `avar correlate`: table, findings, files asked for; returns the exit status: 0, or 2 for bad input."""
    try:
        points = _all_points(arguments)
        statistics = correlate(points, arguments.resamples, arguments.seed)
        lines = [*findings(statistics, arguments.published), *_mixed_units(points), *_mixed_scales(points)]
        _print(points, lines, arguments)
        if arguments.out is not None:
            _write(arguments.out, points, statistics, lines, arguments)
    except (OSError, ValueError) as error:
        print(f"avar correlate: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _all_points(arguments: argparse.Namespace) -> list[Point]:
    if arguments.resamples < 100:
        raise ValueError(f"--resamples {arguments.resamples}: a 95 % interval wants at least 100")
    points = read_points(arguments.points, arguments.scope, arguments.measure)
    if arguments.published:
        if (arguments.scope, arguments.measure) != ("user", "vas"):
            raise ValueError("--published points are user-scope means of ratios: use --scope user --measure vas")
        points = published_points() + points
    if not points:
        raise ValueError("no points: give vas.json=ACCURACY for each checkpoint, a .csv file, or --published")
    if twice := [name for name, count in Counter(point.name for point in points).items() if count > 1]:
        raise ValueError(f"two points are named '{twice[0]}': tell them apart by NAME:path/to/vas.json=ACCURACY")
    return points


def _mixed_units(points: Sequence[Point]) -> list[str]:
    fraction = next((point.name for point in points if 0 < point.accuracy <= 1), None)
    percent = next((point.name for point in points if point.accuracy > 1), None)
    if fraction is None or percent is None:
        return []
    return [f"Are the accuracies in one unit? '{fraction}' looks like a fraction, '{percent}' like a percentage."]


def _mixed_scales(points: Sequence[Point]) -> list[str]:
    gated = [point.name for point in points if point.gated]
    if not 0 < len(gated) < len(points):
        return []
    return [f"Not on the VAS scale of the others, for their images come in by cross-attention: {', '.join(gated)}."]


def _print(points: Sequence[Point], lines: Sequence[str], arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(title=f"VAS ({arguments.scope} scope, {arguments.measure}) and accuracy of {len(points)} checkpoints")
    for column, side in (("checkpoint", "left"), ("VAS", "right"), ("accuracy", "right"), ("from", "left")):
        table.add_column(column, justify=side, overflow="fold")
    for point in points:
        table.add_row(escape(point.name), f"{point.vas:#.3g}", f"{point.accuracy:#.3g}", escape(point.source))
    console.print(table)
    for line in lines:
        console.print(f"• {line}", highlight=False, markup=False)


def _write(folder: Path, points, statistics: dict, lines: Sequence[str], arguments: argparse.Namespace) -> None:
    from verl_avar.evaluation.partial import write_text
    from verl_avar.report.study_figures import correlation_figure

    results = {
        "scope": arguments.scope,
        "measure": arguments.measure,
        "points": [asdict(point) for point in points],
        "statistics": statistics,
        "findings": list(lines),
    }
    write_text(folder / "correlation.json", json.dumps(results, indent=1, ensure_ascii=False))
    unit = "%" if arguments.published else ""
    figure = correlation_figure(results["points"], statistics, arguments.scope, arguments.measure, unit)
    figure.savefig(folder / "correlation.png")
    print(f"avar correlate: {folder / 'correlation.json'}, {folder / 'correlation.png'}")
