"""The table of models by benchmarks: figures and differences worked by hand, and what it must not claim."""

import csv
import io
import itertools
import json

import numpy as np
import pandas as pd
import pytest
from eval_folder import accuracy, questions, result, results, write_model, write_two

from verl_avar.errors import ConfigError
from verl_avar.evaluation.benchmark.deltas import by_question, delta, exact_p, mean_draws, mean_ratio, units
from verl_avar.evaluation.benchmark.runs import protocol_differences, read_run, read_runs
from verl_avar.evaluation.benchmark.table import AVERAGE, build
from verl_avar.evaluation.benchmark.table_files import as_csv, latex, markdown, notes, write_table


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return read_runs(write_two(tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="module")
def table(runs):
    return build(runs, figures=accuracy, published={"AVAR-7B": "AVAR-Thinker"})


def test_cells_hold_the_figures_worked_by_hand(table):
    base, other = table.lines
    assert list(table.titles) == ["mathvista", "mmstar", AVERAGE]
    assert base.cells["mathvista"].value == pytest.approx(12 / 30) and base.cells["mathvista"].delta is None
    assert other.cells["mathvista"].value == pytest.approx(23 / 30)
    assert base.cells[AVERAGE].value == pytest.approx((12 / 30 + 10 / 20) / 2)
    found = other.cells["mathvista"].delta
    assert (found["pairs"], found["gained"], found["lost"]) == (30, 12, 1)
    assert found["value"] == pytest.approx(11 / 30)
    # Of 13 that changed 1 or fewer go one way: 2 (1 + 13) / 2^13; the smaller of two p-values is doubled.
    assert found["p"] == pytest.approx(28 / 8192) and found["p_holm"] == pytest.approx(56 / 8192) and found["clear"]


def test_the_paired_interval_is_that_of_the_differences(table):
    change = np.array([1] * 12 + [-1] + [0] * 17)
    error = change.std() / np.sqrt(30)
    low, high = table.line("AVAR-7B").cells["mathvista"].delta["interval"]
    assert low == pytest.approx(11 / 30 - 1.96 * error, abs=0.04)
    assert high == pytest.approx(11 / 30 + 1.96 * error, abs=0.04)


def test_a_failed_call_counts_as_wrong(table):
    cell = table.line("AVAR-7B").cells["mmstar"]
    assert (cell.value, cell.asked, cell.questions) == (10 / 20, 20, 20)
    assert (cell.delta["pairs"], cell.delta["gained"], cell.delta["lost"]) == (20, 2, 2)
    assert cell.delta["value"] == pytest.approx(0) and cell.delta["p_holm"] == 1 and not cell.delta["clear"]


def test_only_differences_beyond_chance_are_bold(table):
    assert "**+36.7**" in markdown(table) and "**0.0**" not in markdown(table)
    assert markdown(table).split("\n\n")[0].count("**") == 4  # MathVista's and the average's
    assert r"$\mathbf{+36.7}\,[+" in latex(table) and latex(table).count(r"\mathbf") == 2


def test_published_figures_are_marked_and_the_average_of_other_benchmarks_is_not_compared(table):
    other = table.line("AVAR-7B")
    assert other.cells["mathvista"].published["delta"] == pytest.approx(23 / 30 - 0.747)
    assert other.cells[AVERAGE].published is None and table.line("Base-7B").cells["mathvista"].published is None
    assert "| AVAR-Thinker† | 74.7 | 64.1 | 56.1 |" in markdown(table)
    assert "published, other protocol" in markdown(table) and "published, other protocol" in latex(table)


def test_there_is_no_average_over_fewer_than_all_benchmarks(runs, tmp_path):
    fewer = [one for one in results("AVAR-7B") if one["benchmark"] == "mathvista"]
    asked = [one for one in questions() if one["benchmark"] == "mathvista"]
    table = build([runs[0], read_run(write_model(tmp_path, "AVAR-7B", fewer, asked))], figures=accuracy)
    line = table.line("AVAR-7B")
    assert line.cells["mmstar"] is None and line.cells[AVERAGE] is None and line.missing == ["MMStar"]
    assert "AVAR-7B: no average, for these were not run, or not to their end: MMStar." in notes(table)
    assert "| – | – |" in markdown(table) and "-- & --" in latex(table)
    assert table.line("Base-7B").cells[AVERAGE] is not None and table.tests == 1


def test_there_is_no_average_over_a_benchmark_that_was_not_run_to_its_end(tmp_path):
    fewer = [one for one in results("Base-7B") if one["id"] != "19"]
    table = build([read_run(write_model(tmp_path, "Base-7B", fewer))], figures=accuracy)
    assert table.lines[0].cells["mmstar"].value == pytest.approx(10 / 19) and table.lines[0].cells[AVERAGE] is None
    assert table.lines[0].missing == ["MathVista (29 of 30 questions)", "MMStar (19 of 20 questions)"]


def test_the_csv_holds_every_figure_as_a_share(table):
    rows = list(csv.DictReader(io.StringIO(as_csv(table))))
    assert [row["kind"] for row in rows] == ["run", "part", "run", "part", "run"] * 2 + ["published"] * 3
    assert [row["part"] for row in rows if row["kind"] == "part"] == ["category=all"] * 4
    (cell,) = [row for row in rows if (row["model"], row["benchmark"]) == ("AVAR-7B", "mathvista") and not row["part"]]
    assert float(cell["delta"]) == pytest.approx(11 / 30) and cell["base"] == "Base-7B" and cell["clear"] == "True"
    assert float(cell["published"]) == pytest.approx(0.747) and cell["published_model"] == "AVAR-Thinker"
    (first,) = [row for row in rows if (row["model"], row["benchmark"]) == ("Base-7B", "mathvista") and not row["part"]]
    assert float(first["truncated"]) == pytest.approx(4 / 30) and first["delta"] == ""


def test_latex_and_markdown_survive_any_name(tmp_path):
    table = build([read_run(write_model(tmp_path, "a_b & 50 % {x} | y", results("Base-7B")))], figures=accuracy)
    assert r"a\_b \& 50 \% \{x\} | y" in latex(table)
    assert r"a\_b & 50 % \{x\} \| y" in markdown(table)
    rows = markdown(table).split("\n\n")[0].splitlines()
    assert {len(line.replace(r"\|", "").split("|")) for line in rows} == {6}


def test_the_table_is_the_same_whatever_the_order_of_rows(runs, table, tmp_path):
    shuffled = [write_model(tmp_path, name, results(name)[::-1]) for name in ("Base-7B", "AVAR-7B")]
    again = build(read_runs(shuffled), figures=accuracy, published={"AVAR-7B": "AVAR-Thinker"})
    assert markdown(again) == markdown(table) and as_csv(again) == as_csv(table)
    assert [path.name for path in write_table(table, tmp_path / "report")] == ["table.md", "table.tex", "table.csv"]


def test_the_base_may_be_any_of_the_runs(runs):
    table = build(runs, base="AVAR-7B", figures=accuracy)
    assert [line.name for line in table.lines] == ["AVAR-7B", "Base-7B"]
    assert table.line("Base-7B").cells["mathvista"].delta["value"] == pytest.approx(-11 / 30)


@pytest.mark.parametrize("wrong, said", [({"base": "X"}, "none of the runs: Base-7B, AVAR-7B"),
                                         ({"published": {"X": "GPT-4o"}}, "none of the runs"),
                                         ({"published": {"AVAR-7B": "X"}}, "no model 'X'")])  # fmt: skip
def test_unknown_names_are_told(runs, wrong, said):
    with pytest.raises(ConfigError, match=said):
        build(runs, figures=accuracy, **wrong)


def test_folders_without_a_run_and_two_of_one_name_are_told(tmp_path):
    with pytest.raises(ConfigError, match=r"no summary\.json"):
        read_run(tmp_path)
    folder = write_model(tmp_path, "Base-7B")
    with pytest.raises(ConfigError, match="two runs are named 'Base-7B'"):
        read_runs([folder, folder])
    (folder / "results.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(ConfigError, match="run avar eval again"):
        read_run(folder)


def test_runs_of_different_settings_are_told(runs, tmp_path):
    assert protocol_differences(runs) == []
    other = read_run(write_model(tmp_path, "AVAR-7B", sampling={"temperature": 1}))
    assert protocol_differences([runs[0], other]) == [
        'AVAR-7B was run with sampling {"temperature": 1}, Base-7B with {"max_tokens": 4096, "temperature": 0}.'
    ]


def test_repeats_count_as_one_question():
    asked = questions()[:2]
    rows = [result(asked[0], n < 3, repeat=n) for n in range(4)] + [result(asked[1], n < 1, repeat=n) for n in range(4)]
    base = [result(question, n < 2, repeat=n) for question in asked for n in range(4)]
    own, before = pd.DataFrame(rows), pd.DataFrame(base)
    assert by_question(own).to_dict() == {"0": 0.75, "1": 0.25}
    found = delta(own, before)
    assert (found["pairs"], found["gained"], found["lost"], found["value"]) == (2, 1, 1, 0)


def hallusion_results(right) -> pd.DataFrame:
    """Two sets of HallusionBench's kind, each of two questions on two figures; right: their eight verdicts."""
    keys = list(itertools.product(range(2), range(2), range(2)))
    metas = [
        {"category": "VD", "subcategory": "map", "set_id": s, "figure_id": f, "question_id": q} for s, f, q in keys
    ]
    rows = [result({**questions()[0], "benchmark": "hallusionbench", "id": f"{n}", "meta": json.dumps(meta)}, one)
            for n, (meta, one) in enumerate(zip(metas, right, strict=True))]  # fmt: skip
    return pd.DataFrame(rows)


def test_hallusion_benchs_difference_is_that_of_its_three_accuracies_drawn_by_sets():
    base = hallusion_results([True, False, True, True, False, False, False, False])
    own = hallusion_results([True, True, True, True, False, True, False, False])
    # aAcc 3/8 to 5/8; fAcc (all questions of a figure) 1/4 to 2/4; qAcc (a question on all figures) 1/4 to 2/4.
    assert mean_ratio(units(base, "hallusion")) == pytest.approx((3 / 8 + 1 / 4 + 1 / 4) / 3)
    found = delta(own, base, "hallusion")
    assert found["value"] == pytest.approx((2 / 8 + 1 / 4 + 1 / 4) / 3) and (found["gained"], found["lost"]) == (2, 0)
    # Of the first set alone: 1/4, 1/2, 1/2; of the second alone: 1/4, 0, 0; each is drawn alone a quarter of the time.
    ends = (1 / 4 / 3, (1 / 4 + 1 / 2 + 1 / 2) / 3)
    assert {round(value, 6) for value in found["draws"]} == {round(v, 6) for v in (*ends, found["value"])}
    assert np.mean(np.isclose(found["draws"], ends[0])) == pytest.approx(0.25, abs=0.05)


def test_mmmu_pros_difference_weighs_its_two_parts_alike():
    metas = [json.dumps({"part": "standard" if n < 6 else "vision"}) for n in range(8)]
    own, base = (
        pd.DataFrame(
            [result({**questions()[n], "id": f"{n}", "meta": meta}, n in right) for n, meta in enumerate(metas)]
        )
        for right in ({0, 1, 2, 6}, {0})
    )
    found = delta(own, base, "mmmu_pro")
    assert found["value"] == pytest.approx((2 / 6 + 1 / 2) / 2) and found["pairs"] == 8
    with pytest.raises(ValueError, match="no metric bleu"):
        delta(own, base, "bleu")


def test_differences_are_those_of_the_benchmarks_metrics():
    metrics = pytest.importorskip("verl_avar.evaluation.benchmark.metrics")
    rng = np.random.default_rng(0)
    own, base = (hallusion_results(list(map(bool, rng.integers(2, size=8)))) for _ in range(2))
    new, old = (metrics.figures(one)["hallusionbench"]["main"]["value"] for one in (own, base))
    assert delta(own, base, "hallusion")["value"] == pytest.approx(new - old)


def test_the_table_takes_the_benchmarks_own_metrics_by_default(runs, table):
    pytest.importorskip("verl_avar.evaluation.benchmark.metrics")
    own = build(runs)
    for line, stand_in in zip(own.lines, table.lines, strict=True):
        assert [cell.value for cell in line.cells.values()] == [c.value for c in stand_in.cells.values()]
    assert own.line("AVAR-7B").cells["mmstar"].figures["failed"] == 1


def test_the_bootstrap_of_a_mean_is_that_of_all_resamples():
    values = np.array([0.0, 1.0, 1.0])
    exact = [np.mean(drawn) for drawn in itertools.product(values, repeat=3)]
    drawn = mean_draws(values, 20000, 0)
    for mean in (0, 1 / 3, 2 / 3, 1):
        assert np.isclose(drawn, mean).mean() == pytest.approx(np.isclose(exact, mean).mean(), abs=0.01)
    assert exact_p(0, 0) == 1 and exact_p(5, 0) == pytest.approx(0.0625)


@pytest.mark.parametrize(
    ("count", "about", "said"),
    [
        (29, {}, "AVAR-7B: its copy of MathVista has 30 questions, the published benchmark 29: another set, "),
        (1000, {}, "AVAR-7B: its copy of MathVista has 30 questions, the published benchmark 1,000: another set, "),
        (
            31,
            {"broken": 1},
            "has 30 questions (broken rows of the suite that were left out: 1), the published benchmark 31",
        ),
        (1000, {"limit": 30}, "AVAR-7B: 30 of the 1,000 questions of MathVista were asked (--limit 30)."),
        (30, {"limit": 30}, None),
    ],
)
def test_a_copy_of_another_size_is_told_and_is_no_error(tmp_path, count, about, said):
    benchmarks = {
        "mathvista": {"title": "MathVista", "questions": count},
        "mmstar": {"title": "MMStar", "questions": 20},
    }
    table = build([read_run(write_model(tmp_path, "AVAR-7B", benchmarks=benchmarks, **about))], figures=accuracy)
    lines = [line for line in notes(table) if "questions of" in line or "copy" in line]
    assert len(lines) == (said is not None) and all(said in line for line in lines)
    assert all(line in markdown(table) for line in lines)
    assert (table.lines[0].cells[AVERAGE] is None) == (count > 30)
