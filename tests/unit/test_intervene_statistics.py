"""Statistics of a sweep on tables made by hand: figures, paired differences, tests, and what is said of them."""

import math

import numpy as np
import pandas as pd
import pytest

from verl_avar.evaluation.paired import bootstrap_interval, compare, holm, mcnemar, wilson
from verl_avar.evaluation.sweep_verdicts import print_sweep, verdicts

BASE, BIASED = "0,0", "0.5,0"


def lines(point, right, number=None, **columns) -> pd.DataFrame:
    n = len(right)
    frame = {
        "point": point,
        "number": list(range(n)) if number is None else number,
        "right": np.array(right, dtype=bool),
        "well_formed": True,
        "tokens": 10,
        "cut": False,
        "queries": 10,
        "vas": 2.0,
        "head_mean": 1.0,
        "visual": 0.2,
        "system": 0.2,
    }
    return pd.DataFrame({**frame, **columns})


def both(before, after, **columns) -> list[dict]:
    table = pd.concat([lines(BASE, before), lines(BIASED, after, **columns)])
    return compare(table, [BASE, BIASED], BASE, resamples=500)


def named(figures: list[dict]) -> list[dict]:
    return [{"name": "baseline" if i == 0 else f"β {i}", "baseline": i == 0} | f for i, f in enumerate(figures)]


def test_accuracy_and_its_difference_by_hand():
    base, biased = both([1, 1, 0, 0, 0], [1, 0, 1, 1, 1])
    assert base["accuracy"]["value"] == 0.4 and base["accuracy"]["difference"] is None and "p" not in base["accuracy"]
    got = biased["accuracy"]
    assert got["value"] == 0.8 and got["difference"] == pytest.approx(0.4)
    assert (got["gained"], got["lost"]) == (3, 1)
    assert got["p"] == pytest.approx(2 * 5 / 16)  # 3 or more of 4 fair coins on one side: 5/16
    low, high = got["difference_interval"]
    assert -1 <= low < 0.4 < high <= 1


@pytest.mark.parametrize(
    ("gained", "lost", "p"), [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (6, 0, 2 / 64), (3, 3, 1.0), (1, 7, 18 / 256)]
)
def test_mcnemar_is_exact(gained, lost, p):
    before = [False] * gained + [True] * lost + [True, False] * 4
    after = [True] * gained + [False] * lost + [True, False] * 4
    assert mcnemar(before, after) == {"gained": gained, "lost": lost, "p": pytest.approx(p)}


@pytest.mark.parametrize(
    ("raw", "corrected"),
    [
        ([], []),
        ([0.03], [0.03]),
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),  # 3·0.01; 2·0.03; max(0.06, 1·0.04)
        ([0.5, 0.9], [1.0, 1.0]),
        ([0.02, 0.02], [0.04, 0.04]),
    ],
)
def test_holm_by_hand(raw, corrected):
    assert holm(raw) == pytest.approx(corrected)


def test_holm_counts_the_points_that_were_compared():
    right = np.arange(40) < 10
    gained = np.arange(40) < 18  # 8 gained, none lost: p = 2/256
    table = pd.concat([lines(BASE, right), lines("1,0", gained), lines("2,0", right), lines("3,0", [], number=[])])
    _, one, two, none = compare(table, [BASE, "1,0", "2,0", "3,0"], BASE, resamples=200)
    assert one["accuracy"]["p"] == pytest.approx(2 / 256) and one["accuracy"]["p_holm"] == pytest.approx(4 / 256)
    assert two["accuracy"]["p_holm"] == 1 and "p" not in none["accuracy"] and none["accuracy"]["value"] is None


def test_attention_counts_by_queries_as_avar_vas_does():
    table = lines(BASE, [1, 1], queries=[1, 3], head_mean=[4.0, 8.0], tokens=[1, 3])
    (figures,) = compare(table, [BASE], BASE, resamples=200)
    assert figures["head_mean"]["value"] == pytest.approx((4 + 3 * 8) / 4)
    assert figures["tokens"]["value"] == 2  # a length is no figure per query


def test_difference_of_attention_is_over_samples_that_have_it_at_both_points():
    before = lines(BASE, [1, 1, 1], head_mean=[1.0, 2.0, math.nan], queries=[2, 2, 5])
    after = lines(BIASED, [1, 1, 1], head_mean=[3.0, math.nan, 9.0], queries=[4, 4, 4])
    _, figures = compare(pd.concat([before, after]), [BASE, BIASED], BASE, resamples=200)
    assert figures["head_mean"]["value"] == pytest.approx(6.0)
    assert figures["head_mean"]["difference"] == pytest.approx(3 - 1)
    assert figures["head_mean"]["difference_interval"] is None  # one pair


def test_only_samples_of_both_points_are_compared():
    table = pd.concat([lines(BASE, [1, 0, 0], number=[0, 1, 2]), lines(BIASED, [1, 1, 1], number=[1, 2, 7])])
    _, figures = compare(table, [BASE, BIASED], BASE, resamples=200)
    assert (figures["samples"], figures["pairs"]) == (3, 2)
    assert figures["accuracy"]["difference"] == 1 and figures["accuracy"]["gained"] == 2


def test_pairs_are_matched_by_sample_not_by_place():
    table = pd.concat([lines(BASE, [1, 0], number=[4, 9]), lines(BIASED, [0, 1], number=[9, 4])])
    _, figures = compare(table, [BASE, BIASED], BASE, resamples=200)
    assert (figures["accuracy"]["gained"], figures["accuracy"]["lost"]) == (0, 0)


def test_nothing_measured_is_none_everywhere():
    base, biased = both([1, 0], [1, 0], head_mean=math.nan, vas=math.nan)
    assert biased["head_mean"] == dict.fromkeys(("value", "interval", "difference", "difference_interval")) | {
        "clear": False
    }
    assert base["head_mean"]["value"] == 1


@pytest.mark.parametrize(("samples", "clear"), [(5, False), (6, True)])
def test_a_change_of_all_samples_alike_is_clear_from_six_on(samples, clear):
    points = named(both([1] * samples, [0] * samples, well_formed=False))
    figure = points[1]["format"]
    assert figure["difference"] == -1 and figure["difference_interval"] is None
    assert figure["clear"] == clear and not points[1]["tokens"]["clear"]
    said = " ".join(verdicts(points))
    assert ("format rate of responses changed at 1 of 1 points, most at β 1: -100.0 points." in said) == clear


def test_bootstrap_is_seeded_paired_and_agrees_with_a_plain_one():
    rng = np.random.default_rng(0)
    old = rng.normal(size=60) * 5
    new = old + 1 + rng.normal(size=60) * 0.1  # pairing removes what samples differ by
    table = pd.concat([lines(BASE, [1] * 60, head_mean=old), lines(BIASED, [1] * 60, head_mean=new)])
    first, again = (compare(table, [BASE, BIASED], BASE, seed=5)[1]["head_mean"] for _ in range(2))
    assert first == again
    low, high = first["difference_interval"]
    plain = [np.mean((new - old)[rng.integers(60, size=60)]) for _ in range(4000)]
    assert [low, high] == pytest.approx(np.quantile(plain, [0.025, 0.975]), abs=0.01)
    wide = first["interval"]
    assert wide[1] - wide[0] > 10 * (high - low)


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        values = rng.normal(3, 2, size=40)
        low, high = bootstrap_interval((values, np.ones(40)), _weighted, 400, rng)
        hits += low < 3 < high
    assert 0.88 < hits / 200 <= 1


def _weighted(values, weights, axis=-1):
    return (values * weights).sum(axis) / weights.sum(axis)


def test_an_interval_that_a_bootstrap_cannot_tell_is_none():
    rng = np.random.default_rng(0)
    assert bootstrap_interval((np.array([3.0]), np.ones(1)), _weighted, 100, rng) is None
    assert bootstrap_interval((np.array([3.0, 3.0, 3.0]), np.ones(3)), _weighted, 100, rng) is None


def test_proportions_at_the_edge_keep_an_interval():
    assert wilson(0, 0) is None
    low, high = wilson(20, 20)
    assert low == pytest.approx(20 / (20 + 1.959964**2)) and high == 1
    base, _ = both([1] * 20, [1] * 20)
    assert base["accuracy"]["interval"] == pytest.approx([low, high])


def test_verdict_of_a_gain():
    before, after = np.arange(40) < 10, np.arange(40) < 20
    said = verdicts(named(both(before, after)))
    assert said[0].startswith("Without intervention 10 of 40 answers are right: 25.0 %")
    assert said[1].startswith("β 1 raised accuracy: +25.0 points (") and "10 gained, 0 lost" in said[1]


def test_verdict_of_a_loss():
    said = verdicts(named(both(np.arange(40) < 20, np.arange(40) < 10)))
    assert said[1].startswith("β 1 lowered accuracy: -25.0 points")


def test_verdict_of_nothing_says_what_stays_possible():
    before = np.arange(40) < 20
    after = np.roll(before, 4)  # 4 gained, 4 lost
    said = " ".join(verdicts(named(both(before, after))))
    assert "No change of accuracy beyond chance at the one point" in said
    assert "changes from -" in said and "are possible" in said and "raised" not in said


def test_verdict_of_too_few_changes():
    said = " ".join(verdicts(named(both([0] * 5 + [1] * 5, [1] * 10))))
    assert "At most 5 answers changed" in said and "no test can call a change significant" in said


def test_verdict_of_no_change_at_all():
    said = " ".join(verdicts(named(both([0, 1, 1], [0, 1, 1]))))
    assert "No answer turned right or wrong at the one point" in said and "possible" not in said


def test_verdicts_of_attention_and_side_effects():
    rng = np.random.default_rng(0)
    moved = {"head_mean": 2 + rng.random(30), "visual": 0.4, "tokens": 20 + rng.integers(0, 5, 30)}
    moved |= {"well_formed": np.arange(30) < 15, "cut": np.arange(30) < 4}
    said = verdicts(named(both([1, 0, 1] * 10, [1, 0, 1] * 10, **moved)))
    assert any("VAS of the response moved at 1 of 1 points, most at β 1: 1 to 2." in line for line in said)
    assert any(line.startswith("The format rate of responses changed") and "-50.0 points" in line for line in said)
    assert any(line.startswith("The length of responses changed") for line in said)
    assert any("cut off at the limit of new tokens: up to 4 at a point (β 1)" in line for line in said)


def test_a_few_samples_move_nothing_for_sure():
    points = named(both([1, 1, 1], [1, 1, 1], head_mean=[2.0, 2.1, 2.2]))
    assert points[1]["head_mean"]["difference_interval"][0] > 0 and not points[1]["head_mean"]["clear"]
    assert "The head-averaged VAS of the response: fewer than 6 samples can't tell." in verdicts(points)


def test_names_and_reasons_are_not_taken_for_markup(capsys):
    points = named(both([1, 1], [1, 1]))
    print_sweep({"settings": {"model": "a/[b]"}, "points": points, "verdicts": ["row [/x]"], "notes": ["[red]n[/red]"]})
    out = capsys.readouterr().out
    assert "inference: [b]" in out and "• row [/x]" in out and "• [red]n[/red]" in out


def test_verdicts_without_vas_and_without_pairs():
    table = pd.concat([lines(BASE, [1, 0], head_mean=math.nan), lines(BIASED, [1], number=[9], head_mean=math.nan)])
    said = verdicts(named(compare(table, [BASE, BIASED], BASE, resamples=200)))
    assert "No sample was answered both with and without intervention." in said
    assert any(line.startswith("There is no VAS") for line in said)
    assert verdicts(named(compare(lines(BIASED, [1]), [BASE, BIASED], BASE, resamples=200)))[0].startswith(
        "The baseline answered no sample"
    )
