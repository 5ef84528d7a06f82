"""The paper's tables as data, and whether their averages and gains follow from their own rows (arXiv:2603.03825).

`evaluation/published/` holds them: benchmarks.csv (a model a line, accuracy in %, by benchmark, and the average as
printed), cold_start_data.csv and llama_ladder.csv (averages alone), gains.csv (gains as printed), vas_stages.csv (VAS
and average). An empty cell was not published.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

FOLDER = Path(__file__).parent.parent / "published"
# Columns of benchmarks.csv by the names of their definitions, in the paper's order, as a reader sees them.
TITLES = {
    "mathvista": "MathVista",
    "mathvision": "MathVision",
    "mathverse_vo": "MathVerse-VO",
    "mmmu_val": "MMMU val",
    "mmmu_pro": "MMMU-Pro",
    "mmstar": "MMStar",
    "hallusionbench": "HallusionBench",
}
ROUNDING = Decimal("0.05")  # that a figure printed with one decimal may be off by
AVERAGES = {"cold_start_data.csv": "cold-start data", "llama_ladder.csv": "ladder on Llama-3.2-11B-Vision"}


@dataclass(frozen=True)
class Row:
    """A published model: its figures by benchmark, in %, and its average as printed; None: not published.

    base: the model that the paper trains it from, where it is a stage of the paper's own.
    """

    model: str
    base: str | None
    figures: Mapping[str, Decimal | None]
    average: Decimal | None
    source: str

    @property
    def recomputed(self) -> Decimal | None:
        """The mean of the benchmarks; None where one of them was not published."""
        values = list(self.figures.values())
        if not values or None in values:
            return None
        return sum(values, Decimal(0)) / len(values)


def published_rows(path: Path = FOLDER / "benchmarks.csv") -> list[Row]:
    """Rows of one of the tables, in its order; of tables of averages alone, without figures by benchmark."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Row(
                line["model"],
                line["base"] or None,
                {name: _number(line[name]) for name in TITLES if name in line},
                _number(line["avg"]),
                line["source"],
            )
            for line in csv.DictReader(file)
        ]


def _number(cell: str) -> Decimal | None:
    return Decimal(cell) if cell else None


def faults(rows: Sequence[Row]) -> list[str]:
    """Printed averages that do not follow from their row, beyond rounding, each with how far it is off."""
    found = []
    for row in rows:
        if row.average is None or not row.figures:
            continue
        if row.recomputed is None:
            missing = [TITLES[name] for name, value in row.figures.items() if value is None]
            found.append(f"{row.model}: average {row.average} printed, though {', '.join(missing)} is missing.")
        elif abs(row.average - row.recomputed) > ROUNDING:
            found.append(
                f"{row.model}: average {row.average} printed, but the row's {len(row.figures)} figures average "
                f"{row.recomputed:.2f}: {row.average - row.recomputed:+.2f} points."
            )
    return found


def differences(rows: Sequence[Row]) -> dict[str, dict[str, Decimal | None]]:
    """Of each row with a base: its points over the base by benchmark, and `avg` from the recomputed averages, or from
    the printed ones in a table of averages alone."""
    by_model = {row.model: row for row in rows}
    found = {}
    for row in rows:
        if base := by_model.get(row.base):
            pairs = {name: (value, base.figures[name]) for name, value in row.figures.items()}
            pairs["avg"] = (
                (row.recomputed, base.recomputed) if row.figures and base.figures else (row.average, base.average)
            )
            found[row.model] = {n: None if a is None or b is None else a - b for n, (a, b) in pairs.items()}
    return found


def disagreements(rows: Sequence[Row]) -> list[str]:
    """Averages of one model that differ between the tables, and printed gains that do not follow from the averages."""
    printed = {row.model: row.average for row in rows}
    gained = {model: points["avg"] for model, points in differences(rows).items()}
    found = []
    others = {title: [(row.model, row.average) for row in published_rows(FOLDER / f)] for f, title in AVERAGES.items()}
    with (FOLDER / "vas_stages.csv").open(encoding="utf-8", newline="") as file:
        others["stages with VAS"] = [(line["name"], _number(line["accuracy"])) for line in csv.DictReader(file)]
    for title, averages in others.items():
        for model, average in averages:
            if printed.get(model, average) != average:
                found.append(f"{model}: average {printed[model]} in the main table, {average} in: {title}.")
    with (FOLDER / "gains.csv").open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            gain, own = Decimal(line["gain"]), gained.get(line["model"])
            if own is None or abs(gain - own) > ROUNDING:
                said = "can't be recomputed" if own is None else f"its rows give {own:+.2f}"
                found.append(f"{line['model']}: gain {gain:+} printed over {line['base']}, but {said}.")
    return found


def run_published(out: Path | None = None, console: Console | None = None) -> int:
    """Prints the paper's tables, recomputed; with `out`, draws out/published.png. Returns 0: a fault is a finding."""
    from rich.console import Console

    console = console or Console()
    rows = published_rows()
    console.print(_table(rows))
    for file, title in AVERAGES.items():
        console.print(_averages(title, file, rows))
    broken = faults(rows)
    checked = sum(row.average is not None for row in rows)
    lines = [
        f"{checked - len(broken)} of {checked} printed averages follow from their rows, within {ROUNDING} of rounding.",
        *broken,
        *(
            disagreements(rows)
            or ["Averages that stand in several tables agree, and so does the gain of the abstract."]
        ),
        "Figures as published, in %, under the paper's protocol: not comparable with a run under another one.",
    ]
    for line in lines:
        console.print(f"• {line}", highlight=False, markup=False)
    if out is not None:
        from verl_avar.report.eval_published import comparison

        Path(out).mkdir(parents=True, exist_ok=True)
        comparison(rows).savefig(Path(out) / "published.png")
        console.print(f"avar eval published: {Path(out) / 'published.png'}", highlight=False, markup=False)
    return 0


def _table(rows: Sequence[Row]):
    """A model a line; under one that has a base, its points over the base."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title="Published accuracy, %",
        caption="signed: points over the base; ≠: does not follow from the row",
        box=SIMPLE_HEAD,
        padding=0,
    )
    table.add_column("model", overflow="fold", min_width=14)
    for title in (*TITLES.values(), "avg printed", "avg"):
        broken = re.sub(r"(?<=[a-z])(?=[A-Z])|[ -]", "\n", title)  # ten columns fit into 80 characters
        table.add_column(broken, justify="right")
    gains = differences(rows)
    for row in rows:
        recomputed = row.recomputed
        off = row.average is not None and (recomputed is None or abs(row.average - recomputed) > ROUNDING)
        cells = [_cell(value) for value in row.figures.values()]
        table.add_row(row.model, *cells, _cell(row.average), _cell(recomputed, ".2f") + " ≠" * off)
        if points := gains.get(row.model):
            values = [points[name] for name in TITLES]
            table.add_row(
                "", *(_cell(value, "+.1f") for value in values), "", _cell(points["avg"], "+.2f"), style="dim"
            )
    return table


def _averages(title: str, file: str, main: Sequence[Row]):
    from rich.table import Table

    rows = published_rows(FOLDER / file)
    bases = [row for row in main if row.model in {one.base for one in rows} - {one.model for one in rows}]
    gains = differences([Row(row.model, None, {}, row.average, row.source) for row in bases] + rows)
    table = Table(title=f"Published averages: {title}")
    table.add_column("model", overflow="fold")
    table.add_column("avg", justify="right")
    table.add_column("± base", justify="right")
    for row in rows:
        table.add_row(row.model, _cell(row.average), _cell(gains.get(row.model, {}).get("avg"), "+.1f"))
    return table


def _cell(value: Decimal | None, form: str = ".1f") -> str:
    return "–" if value is None else format(value, form)
