"""The paper's tables as data: what follows from their own rows, and that whatever does not is told."""

import io
from dataclasses import replace
from decimal import Decimal

import pytest
from rich.console import Console

from verl_avar.evaluation.benchmark.published import (
    TITLES,
    Row,
    differences,
    disagreements,
    faults,
    published_rows,
    run_published,
)
from verl_avar.evaluation.points import published_points


def made(model="m", values=(10, 20, 30, 40, 50, 60, 70), average="40.0", base=None):
    figures = {name: None if v is None else Decimal(v) for name, v in zip(TITLES, values, strict=True)}
    return Row(model, base, figures, None if average is None else Decimal(average), "made up")


def test_every_printed_average_follows_from_its_row_but_one():
    rows = published_rows()
    assert len(rows) == 17 and sum(row.average is not None for row in rows) == 13
    (fault,) = faults(rows)
    # (75.1 + 32.9 + 45.8 + 55.5 + 40.0 + 65.0 + 52.3) / 7 = 366.6 / 7 = 52.371…
    assert fault.startswith("ThinkLite-VL: average 53.1") and "52.37" in fault and "+0.73" in fault


@pytest.mark.parametrize("average, told", [("40.0", False), ("40.05", False), ("39.95", False), ("40.06", True)])
def test_rounding_is_allowed_and_no_more(average, told):
    assert bool(faults([made(average=average)])) == told


def test_an_average_over_a_gap_is_reported_and_not_recomputed():
    row = made(values=(10, None, 30, 40, 50, 60, 70), average="43.3")
    assert row.recomputed is None
    assert faults([row]) == ["m: average 43.3 printed, though MathVision is missing."]
    assert faults([replace(row, average=None)]) == []


def test_differences_are_taken_benchmark_by_benchmark_to_the_named_base():
    points = differences(published_rows())
    assert list(points) == ["+ VARD", "+ VARD + AGTO", "AVAR-Thinker"]
    assert points["+ VARD"]["mmmu_val"] == Decimal("-2.9") and points["AVAR-Thinker"]["mathvision"] == Decimal("12.2")
    assert round(points["AVAR-Thinker"]["avg"], 3) == Decimal("7.014")


def test_the_tables_agree_with_each_other_and_a_changed_one_is_told():
    rows = published_rows()
    assert disagreements(rows) == []
    changed = [replace(row, average=Decimal("51.5")) if row.model == "+ VARD" else row for row in rows]
    assert [line.partition(":")[0] for line in disagreements(changed)] == ["+ VARD", "+ VARD"]
    assert "cold-start data" in disagreements(changed)[0] and "VAS" in disagreements(changed)[1]
    worse = [replace(row, figures=row.figures | {"mmmu_val": Decimal(60)}) if row.model == "AVAR-Thinker" else row
             for row in rows]  # fmt: skip
    assert any("gain +7.0 printed" in line and "+6.47" in line for line in disagreements(worse))
    assert {point.name for point in published_points()} <= {row.model for row in rows}


@pytest.mark.parametrize("width", [80, 160])
def test_the_command_prints_all_of_it_and_draws_the_figure(tmp_path, width):
    console = Console(file=io.StringIO(), width=width)
    assert run_published(tmp_path / "new" if width == 80 else None, console) == 0
    text = console.file.getvalue()
    assert "12 of 13 printed averages follow" in text and "52.37 ≠" in text and "+12.2" in text and "+9.5" in text
    assert max(map(len, text.splitlines())) <= width
    assert (tmp_path / "new" / "published.png").exists() == (width == 80)
