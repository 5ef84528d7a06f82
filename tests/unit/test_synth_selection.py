"""Selection and weighting by numbers worked out by hand, and against naive loops."""

import math
import random

import numpy as np
import pandas as pd
import pytest

from verl_avar.synthesis.attention_figure import figure
from verl_avar.synthesis.selection import best, repeats, report, resample, select, spearman

NAN = float("nan")


def test_the_share_with_the_most_attention_is_kept_and_ties_go_by_id():
    attention = np.array([0.2, 0.5, 0.3, 0.3, NAN])
    chosen = select(["a", "b", "d", "c", "e"], attention, 0.5, weight=True)
    # Two of four measured rows: b, and c before d; e is unknown, not low. Weights 0.5 and 0.3 over their mean 0.4.
    assert chosen.kept.tolist() == [False, True, False, True, True]
    assert chosen.weights.tolist() == pytest.approx([0, 1.25, 0, 0.75, 1])
    assert chosen.threshold == 0.3


def test_all_rows_are_kept_with_weight_1_where_nothing_is_asked_or_known():
    everything = select(["a", "b"], np.array([0.1, 0.9]), 1.0, weight=False)
    assert everything.kept.all() and everything.weights.tolist() == [1, 1]
    nothing = select(["a", "b"], np.array([NAN, NAN]), 0.5, weight=True)
    assert nothing.kept.all() and nothing.weights.tolist() == [1, 1] and nothing.threshold is None
    assert select(["a", "b"], np.zeros(2), 0.01, weight=True).weights.tolist() == [1, 0]  # at least one row


def test_selection_does_not_depend_on_the_order_of_the_rows():
    rng = np.random.default_rng(0)
    ids, attention = list(range(200)), rng.integers(0, 20, 200) / 20
    reference = select(ids, attention, 0.3, True)
    order = rng.permutation(200)
    shuffled = select(order.tolist(), attention[order], 0.3, True)
    assert (shuffled.kept == reference.kept[order]).all()
    assert reference.kept.sum() == 60 and reference.weights[reference.kept].mean() == pytest.approx(1)


def test_the_best_candidate_has_the_most_attention_and_unmeasured_ones_come_last():
    assert best([("a", 0.2), ("b", 0.4), ("c", 0.4)]) == 1
    assert best([("a", None), ("b", 0.0)]) == 1
    assert best([("a", None), ("b", None)]) == 0
    with pytest.raises(ValueError, match="no candidates"):
        best([])


def naive_repeats(weights: list[float], seed: int) -> list[int]:
    """Points start, start + 1, … dropped one by one on the line of the rows' pieces."""
    n, total = len(weights), sum(weights)
    start = random.Random(f"repeats {seed}").random()
    counts = [0] * n
    for point in range(n):
        position, row, end = start + point, 0, weights[0] * n / total
        while end <= position:
            row += 1
            end += weights[row] * n / total
        counts[row] += 1
    return counts


@pytest.mark.parametrize("seed", range(5))
def test_repeats_are_the_weights_rounded_up_or_down_and_n_in_all(seed):
    rng = random.Random(seed)
    weights = [rng.choice([0.0, rng.random(), 3 * rng.random()]) for _ in range(40)]
    counts = repeats(weights, seed)
    assert counts == naive_repeats(weights, seed) and sum(counts) == 40
    mean = sum(weights) / 40
    for count, weight in zip(counts, weights, strict=True):
        assert math.floor(weight / mean - 1e-9) <= count <= math.ceil(weight / mean + 1e-9)


def test_repeats_have_the_weights_as_their_mean_over_seeds():
    weights = [0.25, 1.75, 0.0, 2.0]
    mean = np.mean([repeats(weights, seed) for seed in range(2000)], axis=0)
    assert mean == pytest.approx(weights, abs=0.04)  # four standard errors of a coin over 2000 seeds
    assert repeats([1.0] * 7, seed=3) == [1] * 7 and repeats([], seed=0) == []
    assert list(resample("abcd", [0, 2, 0, 2], seed=1)) == ["b", "b", "d", "d"]
    for bad in ([1.0, -1.0], [NAN], [0.0, 0.0]):
        with pytest.raises(ValueError, match="repeats: "):
            repeats(bad, seed=0)


@pytest.fixture
def rows():
    rng = np.random.default_rng(1)
    n = 300
    words = rng.integers(40, 300, n)
    attention = np.clip(0.2 + 0.0008 * words + 0.05 * rng.standard_normal(n), 0, 1)
    attention[::50] = NAN
    table = pd.DataFrame({"id": [f"{i:03}" for i in range(n)], "words": words, "attention": attention})
    return table.assign(source=np.where(np.arange(n) % 3, "one", "two"), task=None, anchors=rng.integers(2, 6, n))


def selected(rows: pd.DataFrame, keep: float, weight: bool) -> pd.DataFrame:
    chosen = select(rows["id"].tolist(), rows["attention"].to_numpy(), keep, weight)
    return rows.assign(kept=chosen.kept, weight=chosen.weights)


@pytest.mark.parametrize("weight", [False, True])
def test_the_report_says_what_selection_changes(rows, weight):
    rows = selected(rows, 0.5, weight)
    found = report(rows, 0.5, weight, resamples=300)
    measured = rows.dropna(subset=["attention"])
    top = measured.sort_values("attention", ascending=False).head(147)
    assert (found["rows"], found["measured"], found["not_measured"], found["kept"]) == (300, 294, 6, 153)
    for name in ("attention", "words", "anchors"):
        after = np.average(top[name], weights=top["attention"] if weight else None)
        assert found[name]["before"]["mean"] == pytest.approx(measured[name].mean())
        assert found[name]["after"]["mean"] == pytest.approx(after)
        low, high = found[name]["interval"]
        assert low < found[name]["difference"] < high
        assert found[name]["difference"] == pytest.approx(after - measured[name].mean())
    assert found["attention"]["before"]["median"] == measured["attention"].sort_values().iloc[146]
    ranks = measured[["attention", "words", "anchors"]].rank().corr()["attention"]
    assert found["spearman"]["words"] == pytest.approx(ranks["words"]) and ranks["words"] > 0.5
    assert found["spearman"]["anchors"] == pytest.approx(ranks["anchors"])
    assert "confounded with length" in found["notes"][1] and "longer" in found["notes"][1]
    assert 0 < found["by_words_alone"] < found["attention"]["difference"]
    groups = {group["name"]: group for group in found["by_source"]}
    ones = rows[rows["source"] == "one"]
    assert groups["one"]["kept_share"] == ones["kept"].mean() and groups["one"]["rows"] == 200
    assert found["by_task"] == []


def test_the_report_says_when_the_mix_of_tasks_changes():
    table = pd.DataFrame({"id": range(8), "attention": np.arange(8) / 8, "words": 9, "anchors": 2, "source": "s"})
    table = selected(table.assign(task=["a", "a", "a", "b", "a", "b", "b", "b"]), 0.5, False)
    # Of the upper half one is of task a, of which there are four in all, and three are of task b.
    found = report(table, 0.5, False, resamples=100)
    assert [(group["name"], group["kept_share"]) for group in found["by_task"]] == [("a", 0.25), ("b", 0.75)]
    assert "The mix of tasks changes: of a 25% are kept, of b 75%." in found["notes"]
    assert not any("sources" in note for note in found["notes"])


def test_the_interval_of_the_difference_holds_what_new_samples_give():
    """Of 40 samples of one population the 95 % interval must hold the true difference nearly always."""
    rng, hits = np.random.default_rng(0), 0
    for seed in range(40):
        table = pd.DataFrame({"id": range(200), "attention": rng.random(200), "words": 50, "anchors": 2})
        table = selected(table.assign(source="s", task="t"), 0.5, False)
        low, high = report(table, 0.5, False, resamples=200, seed=seed)["attention"]["interval"]
        hits += low < 0.25 < high  # the upper half of a uniform has mean 0.75
    assert hits >= 34


def test_a_report_without_spread_or_measurements_claims_nothing():
    table = pd.DataFrame({"id": [1, 2], "attention": [0.5, 0.5], "words": 9, "anchors": 2, "source": "s", "task": "t"})
    found = report(selected(table, 1.0, False), 1.0, False)
    assert found["attention"]["interval"] is None and found["spearman"] == {"words": None, "anchors": None}
    assert found["by_words_alone"] is None and spearman(np.array([1.0]), np.array([2.0])) is None
    unknown = report(selected(table.assign(attention=NAN), 0.5, True), 0.5, True)
    assert (unknown["measured"], unknown["kept"]) == (0, 2) and "attention" not in unknown


def test_the_figure_shows_kept_and_dropped_chains_and_both_means(rows):
    rows = selected(rows, 0.5, False)
    upper, lower = figure(rows, report(rows, 0.5, False, resamples=100)).axes
    labels = [text.get_text() for text in upper.get_legend().get_texts()]
    assert "kept (147)" in labels and "dropped (147)" in labels
    assert sum(label.startswith("mean ") for label in labels) == 2
    assert len(lower.collections) == 2 and "rho" in lower.get_title(loc="left")
