"""What benchmark runs say, in plain lines: gains, losses, nothing, and what the figures can't be trusted with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from verl_avar.evaluation.benchmark import diagnostics
from verl_avar.evaluation.benchmark.published import TITLES
from verl_avar.evaluation.benchmark.runs import Run, protocol_differences
from verl_avar.evaluation.benchmark.table import AVERAGE, Line, Table
from verl_avar.evaluation.benchmark.table_files import p_text, points

if TYPE_CHECKING:
    import pandas as pd

CUT = 0.02  # share of answers cut off from which a figure is said to be low for it
FORMAT = 0.05  # share of answers in no readable format from which that is told
EVEN = 0.05  # of an AUC from 1/2, up to which VAS is said not to tell right answers from wrong ones
WORST = 3  # benchmarks named in a warning
CONTROLS = {"grey_image": "a grey image", "other_image": "another question's image",
            "blackout": "a part of the image blacked out"}  # fmt: skip
RELATED = 0.2  # |ρ| of VAS and length from which it is told


def verdicts(runs: Sequence[Run], table: Table, guesses: Mapping[str, float] | None = None) -> dict[str, list[str]]:
    """Lines for the reader under their headings. guesses: {run's name: share that blind guessing gets right of the
    questions asked without an image}."""
    ordered = [next(run for run in runs if run.name == line.name) for line in table.lines]
    gains = [line for one in table.lines[1:] for line in _gains(one, table)]
    care = [f"Not one protocol: {line}" for line in protocol_differences(ordered)]
    care += [line for one in table.lines for line in _published(one, table)]
    care += [line for run in ordered for line in _limits(run)]
    image = [line for run in ordered if (line := _controls(run, (guesses or {}).get(run.name)))]
    image += [line for run in ordered for line in _blackout(run)]
    image += [line for run in ordered for line in _bias(run)]
    image += [line for run in ordered[1:] for line in _looks(run, ordered[0], table)]
    image += [line for run in ordered for line in _vas(run)]
    seen = gains if len(table.lines) > 1 else _alone(table)
    return {"What was seen": seen, "To be read with care": care, "Does it use the image?": image}


def _range(bounds: Sequence[float] | None) -> str:
    return "" if bounds is None else f" (95 %: {points(bounds[0])} to {points(bounds[1])})"


def _alone(table: Table) -> list[str]:
    (line,) = table.lines
    average = line.cells[AVERAGE]
    if average is None:
        return [f"{line.name}: no average, for these were not run, or not to their end: {', '.join(line.missing)}."]
    of = "on average" if AVERAGE in table.titles else f"on {next(iter(table.titles.values()))}"
    return [f"{line.name}: {points(average.value)} % {of}{_range(average.interval)}. No base was run beside it: "
            "nothing here says whether a method helped."]  # fmt: skip


def _gains(line: Line, table: Table) -> list[str]:
    """The average first, then benchmarks with a difference beyond chance, then the others in one line."""
    found = {name: cell.delta for name, cell in line.cells.items()
             if cell is not None and cell.delta is not None and cell.delta["pairs"]}  # fmt: skip
    average = found.pop(AVERAGE, None)
    lines = []
    if average is not None and AVERAGE in table.titles:
        lines.append(f"{line.name} against {table.base}, average: {_said(average)}.")
    elif average is None and line.missing:
        lines.append(
            f"{line.name}: no average, for these were not run, or not to their end: {', '.join(line.missing)}."
        )
    for name, delta in found.items():
        if delta["clear"]:
            way = "more" if delta["value"] > 0 else "fewer"
            lines.append(
                f"{line.name} answers {points(abs(delta['value']))} points {way} on {table.titles[name]}"
                f"{_range(_turned(delta))}: {delta['gained']} questions gained, {delta['lost']} lost."
            )
    rest = {name: delta for name, delta in found.items() if not delta["clear"]}
    if rest:
        most = max(rest, key=lambda name: abs(rest[name]["value"]))
        titles = ", ".join(table.titles[name] for name in rest)
        largest = f"the largest, {table.titles[most]}: " if len(rest) > 1 else ""
        signed = points(rest[most]["value"], True)
        bounds = rest[most]["interval"]
        ends = "" if bounds is None else f", 95 %: {points(bounds[0])} to {points(bounds[1])}"
        lines.append(
            f"{line.name}: no difference beyond chance on {titles} ({largest}{signed} points{ends}, "
            f"p {p_text(rest[most]['p_holm'])} corrected)."
        )
    return lines


def _said(delta: dict) -> str:
    signed = points(delta["value"], True)
    ends = _range(delta["interval"])
    return f"{signed} points{ends}" + ("" if delta["clear"] else ", not beyond chance")


def _turned(delta: dict) -> list[float] | None:
    """The interval of the difference as it is told: of "fewer", turned round."""
    low, high = delta["interval"]
    return [low, high] if delta["value"] > 0 else [-high, -low]


def _published(line: Line, table: Table) -> list[str]:
    compared = {name: cell.published for name, cell in line.cells.items()
                if cell is not None and cell.published and name in TITLES}  # fmt: skip
    if not compared:
        return []
    name, most = max(compared.items(), key=lambda item: abs(item[1]["delta"]))
    signed = points(most["delta"], True)
    return [f"{line.name} is up to {signed} points from the published {most['model']} ({table.titles[name]}: "
            f"{points(line.cells[name].value)} here, {points(most['value'])} published). Protocols differ: only "
            "differences within this report tell what a method does."]  # fmt: skip


def _limits(run: Run) -> list[str]:
    """Answers cut off, unreadable, or never given; by benchmark, worst first."""
    plain = run.of()
    lines = []
    for problem, least, words in (
        ("truncated", CUT, "answers cut off at the limit of new tokens, so that figures may be too low"),
        ("format", FORMAT, "answers not in the format that was asked for"),
    ):
        shares = (plain["problem"] == problem).groupby(plain["benchmark"]).mean().sort_values(ascending=False)
        found = [f"{run.titles.get(name, name)} {100 * share:.0f} %" for name, share in shares.items() if share > least]
        if found:
            more = f" and {len(found) - WORST} more" if len(found) > WORST else ""
            lines.append(f"{run.name}: {words}: {', '.join(found[:WORST])}{more}.")
    if failed := int(plain["right"].isna().sum()):
        lines.append(f"{run.name}: {failed} of {len(plain)} calls failed; they count as wrong.")
    judged = plain["problem"].fillna("").str.startswith("judge_")
    if judged.any():
        lines.append(f"{run.name}: a judge's verdict could not be read for {int(judged.sum())} answers.")
    return lines


def _controls(run: Run, guess: float | None) -> str | None:
    """What is left without the image, and what the other controls leave."""
    found = {name: one[diagnostics.ALL] for name in diagnostics.controls_of(run)
             if diagnostics.ALL in (one := diagnostics.beside_plain(run, name))}  # fmt: skip
    blind = found.pop("no_image", None)
    parts = []
    if blind is not None:
        chance = "" if guess is None else f" (guessing alone gives {points(guess)})"
        value = points(blind["value"])
        parts.append(f"with no image {value} % are still right: {value} of its {points(blind['plain'])} points are "
                     f"language priors{chance}")  # fmt: skip
    for name, one in found.items():
        bounds = one["interval"]
        apart = bounds is not None and (bounds[0] > 0 or bounds[1] < 0)
        part = f"with {CONTROLS[name]} {points(one['value'])} %"
        parts.append(part if apart else f"{part} (no difference beyond chance)")
    return f"{run.name}: {'; '.join(parts)}." if parts else None


def _blackout(run: Run) -> list[str]:
    """The curve in figures, and the least share whose loss is beyond chance."""
    found = diagnostics.blackout_points(run)
    if not found:
        return []
    shares = ", ".join(f"{100 * share:g}" for share, _ in found)
    values = ", ".join(points(one["value"]) for _, one in found)
    least = next((share for share, one in found if one["interval"] is not None and one["interval"][1] < 0), None)
    said = "no loss beyond chance" if least is None else f"a loss beyond chance from {100 * least:g} % on"
    return [f"{run.name}: with {shares} % of the image black {values} % are right: {said}."]


def _bias(run: Run) -> list[str]:
    points_ = [(beta, one) for beta, one in diagnostics.bias_points(run) if beta]
    if not points_:
        return []
    beta, best = max(points_, key=lambda point: point[1]["difference"])
    signed = points(best["difference"], True)
    chosen = f" (the best of {len(points_)} values, chosen on these questions)" if len(points_) > 1 else ""
    bounds = best["interval"]
    chance = "" if bounds is not None and (bounds[0] > 0 or bounds[1] < 0) else ", not beyond chance"
    return [f"{run.name}: the best visual bias, β = {beta:g}{chosen}, changes accuracy by {signed} points"
            f"{_range(bounds)}{chance}."]  # fmt: skip


def _looks(run: Run, base: Run, table: Table) -> list[str]:
    """Whether more attention to the image came with more right answers."""
    means = [_mean_vas(diagnostics.measured(one)) for one in (run, base)]
    if None in means:
        return []
    new, old = means
    average = table.line(run.name).cells[AVERAGE]
    moved = (
        f"{run.name}: mean VAS {old:.2f} to {new:.2f} ({new / old:.2f}×)" if old > 0 else f"{run.name}: VAS {new:.2f}"
    )
    if average is None or average.delta is None:
        return [f"{moved}."]
    better = average.delta["clear"] and average.delta["value"] > 0
    if new > old:
        return [f"{moved}: it looks more, and {'answers better' if better else 'no better answers were seen'}."]
    return [f"{moved}: it does not look more{', though it answers better' if better else ''}."]


def _mean_vas(answers: pd.DataFrame) -> float | None:
    """Mean over benchmarks of their mean VAS."""
    return float(answers.groupby("benchmark")["vas"].mean().mean()) if len(answers) else None


def _vas(run: Run) -> list[str]:
    answers = diagnostics.measured(run)
    found = diagnostics.right_and_wrong(answers)
    if not found:
        return []
    auc = sum(one["auc"] for one in found.values()) / len(found)
    reading = "says little about which answer is right" if abs(auc - 0.5) < EVEN else (
        "is higher for right answers" if auc > 0.5 else "is lower for right answers")  # fmt: skip
    line = (
        f"{run.name}: within a benchmark VAS {reading} (in {100 * auc:.0f} of 100 pairs the right answer has the "
        "higher one; 50 is chance)"
    )
    rho = diagnostics.length_correlation(answers)
    if rho is not None and abs(rho) >= RELATED:
        line += f"; VAS goes with length (ρ = {rho:.2f}), and so may this".replace("-", "−")
    return [line + "."]
