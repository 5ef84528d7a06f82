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
from verl_avar.evaluation.benchmark.deltas import by_question, delta, exact_p, mean_draws
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


def test_a_failed_call_is_left_out_of_the_pairs_and_told(table):
    cell = table.line("AVAR-7B").cells["mmstar"]
    assert (cell.answered, cell.questions) == (19, 20)
    assert (cell.delta["pairs"], cell.delta["gained"], cell.delta["lost"]) == (19, 2, 2)
    assert cell.delta["value"] == pytest.approx(0) and cell.delta["p_holm"] == 1 and not cell.delta["clear"]
    assert "AVAR-7B: not all questions have an answer: 19 of 20 on MMStar." in notes(table)


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
    assert "no average, for there is no result on MMStar" in markdown(table)
    assert "| – | – |" in markdown(table) and "-- & --" in latex(table)
    assert table.line("Base-7B").cells[AVERAGE] is not None and table.tests == 1


def test_the_csv_holds_every_figure_as_a_share(table):
    rows = list(csv.DictReader(io.StringIO(as_csv(table))))
    assert len(rows) == 9 and [row["kind"] for row in rows] == ["run"] * 6 + ["published"] * 3
    (cell,) = [row for row in rows if (row["model"], row["benchmark"]) == ("AVAR-7B", "mathvista")]
    assert float(cell["delta"]) == pytest.approx(11 / 30) and cell["base"] == "Base-7B" and cell["clear"] == "True"
    assert float(cell["published"]) == pytest.approx(0.747) and cell["published_model"] == "AVAR-Thinker"
    (first,) = [row for row in rows if (row["model"], row["benchmark"]) == ("Base-7B", "mathvista")]
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
    found = delta(own, before, accuracy)
    assert (found["pairs"], found["gained"], found["lost"], found["value"]) == (2, 1, 1, 0)


def test_a_metric_over_groups_is_resampled_by_groups():
    """A metric that counts a set as right when all of it is: two sets of three questions, one of them gained."""

    def sets(table: pd.DataFrame) -> dict:
        keys = table["meta"].map(lambda meta: json.loads(meta)["set_id"])
        whole = table["right"].astype(bool).groupby(keys).all()
        return {"b": {"value": float(whole.mean()), "interval": None}}

    asked = [question | {"meta": json.dumps({"set_id": n // 3})} for n, question in enumerate(questions()[:6])]
    own = pd.DataFrame([result(question, n < 3) for n, question in enumerate(asked)])
    base = pd.DataFrame([result(question, n < 2) for n, question in enumerate(asked)])
    found = delta(own, base, sets)
    assert found["value"] == 0.5 and (found["gained"], found["lost"]) == (1, 0)
    # Two draws of two sets give 0, 1/2 or 1: a quarter, a half, a quarter of the time.
    assert set(found["draws"]) == {0, 0.5, 1} and found["interval"] == [0, 1]
    assert np.mean(found["draws"] == 0.5) == pytest.approx(0.5, abs=0.1)


def test_the_bootstrap_of_a_mean_is_that_of_all_resamples():
    values = np.array([0.0, 1.0, 1.0])
    exact = [np.mean(drawn) for drawn in itertools.product(values, repeat=3)]
    drawn = mean_draws(values, 20000, np.random.default_rng(0))
    for mean in (0, 1 / 3, 2 / 3, 1):
        assert np.isclose(drawn, mean).mean() == pytest.approx(np.isclose(exact, mean).mean(), abs=0.01)
    assert exact_p(0, 0) == 1 and exact_p(5, 0) == pytest.approx(0.0625)
