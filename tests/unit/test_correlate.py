"""Correlation of VAS and accuracy: hand-worked values, few points, and the forms in which points come."""

import argparse
import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

from verl_avar.evaluation import correlate as study
from verl_avar.evaluation.correlate import correlate, findings
from verl_avar.evaluation.points import Point, published_points, read_points


def points(vas, accuracy) -> list[Point]:
    return [Point(f"m{i}", x, y) for i, (x, y) in enumerate(zip(vas, accuracy, strict=True))]


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    study.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture
def vas_json(tmp_path):
    path = tmp_path / "vas.json"
    scopes = {
        "user": {"vas": 8.0, "head_mean": 1.5, "median": 1.2},
        "response": {"vas": 3.0, "head_mean": 0.5, "median": None},
    }
    path.write_text(json.dumps({"model": "some/Model-7B", "scopes": scopes}), encoding="utf-8")
    return path


def test_hand_worked_values():
    # Deviations of x: -1.5 -0.5 0.5 1.5, of y: -1 1 -1 1 (mean 2): Σxy = 2, Σx² = 5, Σy² = 4, r = 2/√20.
    got = correlate(points([1, 2, 3, 4], [1, 3, 1, 3]))
    assert got["points"] == 4
    assert got["pearson"]["r"] == pytest.approx(2 / math.sqrt(20))
    assert got["line"]["slope"] == pytest.approx(2 / 5)
    assert got["line"]["intercept"] == pytest.approx(2 - 0.4 * 2.5)


def test_published_points_are_the_papers():
    got = published_points()
    assert [(p.vas, p.accuracy) for p in got] == [(7.5, 49.1), (10.1, 51.0), (13.8, 52.6), (18.9, 56.1)]
    assert {p.source for p in got} == {"arXiv:2603.03825"}
    statistics = correlate(got)
    assert statistics["pearson"]["r"] == pytest.approx(0.99607, abs=1e-5)
    # Four values in perfect order: 2 of 24 orders are as extreme. The usual approximation would say p = 0.
    assert statistics["spearman"]["rho"] == pytest.approx(1)
    assert statistics["spearman"]["p"] == pytest.approx(2 / 24)


@pytest.mark.parametrize("seed", range(3))
def test_exact_spearman_is_that_of_all_orders_ties_included(seed):
    vas, accuracy = np.random.default_rng(seed).integers(0, 4, size=(2, 6)).astype(float)
    vas[0], accuracy[0] = 9, 9  # never constant
    observed = stats.spearmanr(vas, accuracy).statistic
    orders = np.array([stats.spearmanr(order, accuracy).statistic for order in itertools.permutations(vas)])
    tails = (orders >= observed - 1e-9).mean(), (orders <= observed + 1e-9).mean()
    got = correlate(points(vas, accuracy), resamples=200)["spearman"]
    assert got["rho"] == pytest.approx(observed)
    assert got["p"] == pytest.approx(min(1, 2 * min(tails)))


def test_many_points_use_the_approximation_and_say_so():
    x, noise = np.random.default_rng(0).normal(size=(2, 20))
    got = correlate(points(x, x + noise))
    assert got["spearman"]["p"] == pytest.approx(stats.spearmanr(x, x + noise).pvalue)
    assert got["spearman"]["method"] == "t approximation"
    low, high = got["pearson"]["interval"]
    assert low < got["pearson"]["r"] < high and got["bootstrap"]["undefined"] == 0
    assert not any("few" in line for line in findings(got))


def test_bootstrap_is_seeded_and_agrees_with_a_plain_one():
    chosen = points([1, 2, 3, 4, 5, 7], [1, 3, 2, 5, 4, 6])
    first, again = (correlate(chosen, seed=3)["pearson"]["interval"] for _ in range(2))
    assert first == again
    rng = np.random.default_rng(11)
    vas, accuracy = (np.array([getattr(p, key) for p in chosen]) for key in ("vas", "accuracy"))
    drawn = [rng.integers(6, size=6) for _ in range(4000)]
    plain = [np.corrcoef(vas[i], accuracy[i])[0, 1] for i in drawn if len(set(i)) > 1]
    assert first == pytest.approx(np.quantile(plain, [0.025, 0.975]), abs=0.05)


def test_resamples_without_a_correlation_are_left_out_and_counted(recwarn):
    got = correlate(points([1, 2, 3], [1, 3, 2]), resamples=5000)
    assert got["bootstrap"]["undefined"] / 5000 == pytest.approx(3 / 27, abs=0.02)  # one point drawn three times
    assert got["bootstrap"]["two_points"] == pytest.approx(18 / 27)
    assert np.isfinite(got["pearson"]["interval"]).all()
    assert got["pearson"]["fisher_interval"] == [-1, 1]  # three points say nothing
    assert not recwarn.list


@pytest.mark.parametrize(
    ("vas", "accuracy", "says"),
    [
        ([1, 2], [1, 2], "at least 3 points, got 2"),
        ([], [], "at least 3 points, got 0"),
        ([1, 1, 2], [5, 5, 6], "3 points, but only two different ones"),
        ([5, 5, 5], [1, 2, 3], "same VAS, 5"),
        ([1, 2, 3], [7, 7, 7], "same accuracy, 7"),
        ([1, math.nan, 3], [1, 2, 3], "VAS of 'm1' is not a finite"),
        ([1, 2, 3], [1, 2, math.inf], "accuracy of 'm2' is not a finite"),
    ],
)
def test_what_has_no_correlation_is_an_error(vas, accuracy, says):
    with pytest.raises(ValueError, match=says):
        correlate(points(vas, accuracy))


def test_findings_name_the_number_of_points_and_the_papers_claim_as_the_papers():
    lines = findings(correlate(published_points()), published=True)
    assert lines[0].startswith("4 points: Pearson's r = 0.996")
    assert any("says little" in line for line in lines)
    assert any("one training run" in line for line in lines)
    assert "The paper's own claim" in lines[-1] and "0.9616" in lines[-1]


def test_no_correlation_is_said():
    assert any(
        "No correlation beyond chance" in line for line in findings(correlate(points([1, 2, 3, 4], [1, 3, 1, 3])))
    )


def test_points_from_vas_json(vas_json):
    (plain,) = read_points([f"{vas_json}=41.5"])
    assert (plain.name, plain.vas, plain.accuracy) == ("Model-7B", 8.0, 41.5)
    (named,) = read_points([f"base:{vas_json}=0.4"], scope="response", measure="head_mean")
    assert (named.name, named.vas, named.accuracy, named.source) == ("base", 0.5, 0.4, str(vas_json))


def test_a_folder_stands_for_its_vas_json_and_a_name_given_to_avar_vas_is_kept(vas_json):
    content = json.loads(vas_json.read_text()) | {"name": "AVAR", "cross_attention": True}
    vas_json.write_text(json.dumps(content))
    assert read_points([f"{vas_json.parent}=41.5"]) == [Point("AVAR", 8.0, 41.5, str(vas_json), gated=True)]


def test_points_of_another_scale_are_pointed_out(vas_json, capsys):
    content = json.loads(vas_json.read_text()) | {"cross_attention": True}
    vas_json.write_text(json.dumps(content))
    assert study.run(options("--published", f"mine:{vas_json}=50")) == 0
    assert "by cross-attention: mine." in " ".join(capsys.readouterr().out.split())


def test_a_path_with_a_colon_is_a_path(vas_json, tmp_path):
    odd = tmp_path / "a:b.json"
    odd.write_bytes(vas_json.read_bytes())
    assert read_points([f"{odd}=1"])[0].source == str(odd)
    assert read_points([f"x:{odd}=1"])[0].name == "x"


def test_points_from_csv(vas_json, tmp_path):
    table = tmp_path / "points.csv"
    table.write_text("name, vas, accuracy, source\na, 7.5, 40, somewhere\nb, 9, 41,\n", encoding="utf-8")
    assert read_points([str(table)]) == [Point("a", 7.5, 40, "somewhere"), Point("b", 9, 41, str(table))]
    table.write_text("name,vas_json,accuracy\nc,vas.json,50\n", encoding="utf-8")  # beside the table
    assert read_points([str(table)], measure="median") == [Point("c", 1.2, 50, str(vas_json))]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("name,accuracy\na,1\n", "name,vas,accuracy or name,vas_json,accuracy"),
        ("", "name,vas,accuracy"),
        ("name,vas,accuracy\na,high,1\n", "line 2: the VAS 'high' is not a number"),
        ("name,vas,accuracy\na,1,\n", "line 2: the accuracy '' is not a number"),
        ("name,vas,accuracy\na,,1\n", "line 2: neither vas nor vas_json"),
        ("name,vas,accuracy\na,1\n", "line 2: no accuracy"),
        ("name,vas,accuracy\n,1,50\n", "line 2: no name"),
    ],
)
def test_bad_csv_is_named_with_its_line(tmp_path, content, says):
    table = tmp_path / "points.csv"
    table.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=says):
        read_points([str(table)])


def test_bad_words_are_errors(vas_json):
    with pytest.raises(ValueError, match=r"write vas\.json=ACCURACY"):
        read_points(["vas.json"])
    with pytest.raises(ValueError, match="the accuracy 'high' is not a number"):
        read_points([f"{vas_json}=high"])
    with pytest.raises(ValueError, match=r"no scopes\.response\.median"):
        read_points([f"{vas_json}=1"], scope="response", measure="median")
    with pytest.raises(FileNotFoundError):
        read_points(["nowhere/vas.json=1"])
    for content, says in ((b"{", "is not JSON"), (b"\xff", "is not JSON"), (b"[1]", "is not a vas.json")):
        vas_json.write_bytes(content)
        with pytest.raises(ValueError, match=says):
            read_points([f"{vas_json}=1"])
    table = vas_json.with_name("latin.csv")
    table.write_bytes("name,vas,accuracy\ncafé,1,2\n".encode("latin1"))
    with pytest.raises(ValueError, match=r"latin\.csv is not UTF-8"):
        read_points([str(table)])


def test_the_command_prints_its_findings(capsys):
    assert study.run(options("--published")) == 0
    out = capsys.readouterr().out
    assert "AVAR-Thinker" in out and "4 points are few" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "no points"),
        (["--published", "--resamples", "3"], "at least 100"),
        (["{vas}=1", "--published", "--measure", "median"], "--scope user --measure vas"),
        (["--published", "--scope", "response"], "--scope user --measure vas"),
        (["{vas}=1", "{vas}=2"], "two points are named 'Model-7B'"),
        (["a:{vas}=1", "b:{vas}=2"], "at least 3 points"),
        (["nowhere.csv"], "nowhere.csv"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(vas_json, capsys, words, says):
    assert study.run(options(*(word.format(vas=vas_json) for word in words))) == 2
    err = capsys.readouterr().err
    assert err.startswith("avar correlate: ") and says in err and err.count("\n") == 1


def test_mixed_units_are_noted(vas_json, capsys):
    assert study.run(options("--published", f"mine:{vas_json}=0.5")) == 0
    assert "'mine' looks like a fraction" in " ".join(capsys.readouterr().out.split())


def test_the_command_writes_its_files(vas_json, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    assert study.run(options("--published", f"mine:{vas_json}=50", "--out", str(out))) == 0
    got = json.loads((out / "correlation.json").read_text(encoding="utf-8"))
    assert [p["name"] for p in got["points"]][-1] == "mine" and got["statistics"]["points"] == 5
    assert got["findings"] and (out / "correlation.png").stat().st_size > 5000
    assert "correlation.json" in capsys.readouterr().out
