"""What a sweep of the intervention says, as a table and in plain lines, gains, losses and nothing alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from verl_avar.evaluation.paired import FEWEST

LEVEL = 0.05


def verdicts(points: Sequence[dict]) -> list[str]:
    """Lines from the figures of `paired.compare`, each with `name` and `baseline` (the first point)."""
    baseline, others = points[0], points[1:]
    if not baseline["samples"]:
        return ["The baseline answered no sample: there is nothing to compare with."]
    others = [point for point in others if point["pairs"]]
    return [_start(baseline), *_accuracy(others), *_attention(baseline, others), *_side_effects(baseline, others)]


def _start(baseline: dict) -> str:
    accuracy, n = baseline["accuracy"], baseline["samples"]
    right = round(accuracy["value"] * n)
    low, high = accuracy["interval"]
    return (
        f"Without intervention {right} of {n} answers are right: {100 * accuracy['value']:.1f} % "
        f"(95 % interval {100 * low:.1f} to {100 * high:.1f})."
    )


def _accuracy(others: Sequence[dict]) -> list[str]:
    if not others:
        return ["No sample was answered both with and without intervention."]
    moved = [point for point in others if point["accuracy"]["p_holm"] < LEVEL]
    lines = [
        f"{point['name']} {'raised' if point['accuracy']['difference'] > 0 else 'lowered'} accuracy: {_change(point)}."
        for point in moved
    ]
    if moved:
        rest = len(others) - len(moved)
        others = f"the other {rest} points" if rest > 1 else "the other point"
        return lines + ([f"At {others} no change beyond chance was seen."] if rest else [])
    changed = max(point["accuracy"]["gained"] + point["accuracy"]["lost"] for point in others)
    counted = "the one point" if len(others) == 1 else f"any of {len(others)} points"
    if changed == 0:
        return [f"No answer turned right or wrong at {counted}: accuracy on these samples is what it was."]
    most = max(others, key=lambda point: abs(point["accuracy"]["difference"]))
    lines = [f"No change of accuracy beyond chance at {counted}. The largest, {most['name']}: {_change(most)}."]
    if changed < FEWEST:
        lines.append(
            f"At most {changed} answers changed at a point; with fewer than {FEWEST} no test can call a change "
            "significant. Measure more samples."
        )
    bounds = [b for point in others for b in point["accuracy"]["difference_interval"] or ()]
    if bounds:
        low, high = 100 * min(bounds), 100 * max(bounds)
        lines.append(f"By their 95 % intervals, changes from {low:+.1f} to {high:+.1f} points are possible.")
    return lines


def _change(point: dict) -> str:
    accuracy = point["accuracy"]
    corrected = f", {accuracy['p_holm']:.2g} corrected" if accuracy["p_holm"] != accuracy["p"] else ""
    return (
        f"{100 * accuracy['difference']:+.1f} points{_interval(accuracy['difference_interval'], 100)}, "
        f"{accuracy['gained']} gained, {accuracy['lost']} lost, p = {accuracy['p']:.2g}{corrected}"
    )


def _interval(bounds: Sequence[float] | None, scale: float = 1.0) -> str:
    return "" if bounds is None else f" ({scale * bounds[0]:+.1f} to {scale * bounds[1]:+.1f})"


def _attention(baseline: dict, others: Sequence[dict]) -> list[str]:
    before = baseline["head_mean"]["value"]
    if before is None:
        return ["There is no VAS: no row has a system turn (--system TEXT gives one)."]
    measured = [point for point in others if point["head_mean"]["difference"] is not None]
    moved = [point for point in measured if point["head_mean"]["clear"]]
    if not moved:
        few = max((point["pairs"] for point in measured), default=0) < FEWEST
        why = f"fewer than {FEWEST} samples can't tell" if few else "it moved nowhere beyond chance"
        return [f"The head-averaged VAS of the response: {why}."] if measured else []
    most = max(moved, key=lambda point: abs(point["head_mean"]["difference"]))
    visual = (baseline["visual"]["value"], most["visual"]["value"])
    after = most["head_mean"]["value"]
    return [
        f"The head-averaged VAS of the response moved at {len(moved)} of {len(measured)} points, most at "
        f"{most['name']}: {before:.3g} to {after:.3g}, visual mass {100 * visual[0]:.1f} to {100 * visual[1]:.1f} %. "
        "That is the bias at work, and no evidence of use; accuracy is the test."
    ]


def _side_effects(baseline: dict, others: Sequence[dict]) -> list[str]:
    lines = []
    for key, what, scale, unit in (("format", "format rate", 100, "points"), ("tokens", "length", 1, "tokens")):
        moved = [point for point in others if point[key]["clear"]]
        if moved:
            most = max(moved, key=lambda point, key=key: abs(point[key]["difference"]))
            figure = most[key]
            lines.append(
                f"The {what} of responses changed at {len(moved)} of {len(others)} points, most at {most['name']}: "
                f"{scale * figure['difference']:+.1f} {unit}{_interval(figure['difference_interval'], scale)}."
            )
    cut = {point["name"]: point["cut"] for point in (baseline, *others) if point["cut"]}
    if cut:
        name = max(cut, key=cut.get)
        lines.append(f"Responses cut off at the limit of new tokens: up to {cut[name]} at a point ({name}).")
    return lines


def print_sweep(results: dict) -> None:
    """Prints the table, the verdicts and the notes of intervene.json."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from verl_avar.report.results import digits, percent

    console = Console()
    table = Table(title=f"Intervention at inference: {escape(Path(results['settings']['model']).name)}")
    table.add_column("point", no_wrap=True)
    for column in ("right %", "± points", "p", "VAS", "visual %", "tokens", "format %"):
        table.add_column(column, justify="right")
    for point in results["points"]:
        accuracy = point["accuracy"]
        difference, p = accuracy["difference"], accuracy.get("p_holm")
        table.add_row(
            point["name"],
            percent(accuracy["value"]),
            "–" if difference is None else f"{100 * difference:+.1f}",
            "–" if p is None else f"{p:.2g}",
            digits(point["head_mean"]["value"]),
            percent(point["visual"]["value"]),
            digits(point["tokens"]["value"]),
            percent(point["format"]["value"]),
        )
    console.print(table)
    console.print(
        "±: against the baseline, on the same samples; p: of McNemar's exact test, corrected for the number of points "
        "(Holm); VAS, visual mass: of the response, heads averaged.",
        highlight=False,
    )
    for line in results["verdicts"] + results["notes"]:
        console.print(f"• {line}", highlight=False, markup=False)
