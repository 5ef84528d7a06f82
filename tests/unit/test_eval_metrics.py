"""Benchmark figures from results, against examples worked by hand."""

import json

import numpy as np
import pandas as pd
import pytest

from verl_avar.evaluation.benchmark.metrics import figures, suite_average
from verl_avar.evaluation.benchmark.schema import RESULTS


def results(*rows):
    """schema.RESULTS with a row for each (benchmark, id, right, meta, further columns)."""
    defaults = {"condition": "plain", "repeat": 0, "response": "x", "problem": None}
    return pd.DataFrame(
        [
            dict.fromkeys(RESULTS.names)
            | defaults
            | {"benchmark": benchmark, "id": str(number), "right": right, "meta": json.dumps(meta)}
            | further
            for benchmark, number, right, meta, further in (row if len(row) == 5 else (*row, {}) for row in rows)
        ]
    )


def figure(subcategory, set_id, figure_id, question_id, category="VD"):
    return {
        "category": category,
        "subcategory": subcategory,
        "set_id": set_id,
        "figure_id": figure_id,
        "question_id": question_id,
    }


# Set 0: questions 0, 1 on figures 0, 1; set 1: question 0 on figure 0 of each category, which are two figures.
HALLUSION = [
    ("hallusionbench", 0, True, figure("ocr", "0", "0", "0")),
    ("hallusionbench", 1, True, figure("ocr", "0", "0", "1")),
    ("hallusionbench", 2, True, figure("ocr", "0", "1", "0")),
    ("hallusionbench", 3, False, figure("ocr", "0", "1", "1")),
    ("hallusionbench", 4, True, figure("ocr", "1", "0", "0")),
    ("hallusionbench", 5, False, figure("ocr", "1", "0", "0", "VS")),
]


def test_hallusionbench_by_hand():
    found = figures(results(*HALLUSION))["hallusionbench"]
    # Questions: 4 of 6. Figures: 0/0 and VD's 1/0 are all right, 0/1 and VS' 1/0 are not. Pairs: question 0 of set 0
    # and VD's of set 1 are, question 1 of set 0 and VS' of set 1 are not.
    assert found["aAcc"]["value"] == pytest.approx(4 / 6) and found["aAcc"]["groups"] == 6
    assert found["fAcc"]["value"] == 2 / 4 and found["fAcc"]["groups"] == 4
    assert found["qAcc"]["value"] == 2 / 4 and found["qAcc"]["groups"] == 4
    assert found["main"]["value"] == pytest.approx((4 / 6 + 1 / 2 + 1 / 2) / 3)
    assert found["accuracy"]["value"] == pytest.approx(4 / 6)
    for name in ("aAcc", "fAcc", "qAcc", "main"):
        low, high = found[name]["interval"]
        assert low < found[name]["value"] < high


def test_hallusionbench_agrees_with_a_naive_count():
    rng = np.random.default_rng(1)
    metas = [figure(s, str(t), str(f), str(q), c) for c in ("VD", "VS") for s in ("ocr", "map") for t in range(5)
             for f in range(3) for q in range(2)]  # fmt: skip
    right = rng.random(len(metas)) < 0.7
    found = figures(results(*(("h", n, bool(r), m) for n, (r, m) in enumerate(zip(right, metas, strict=True)))),
                    {"h": "hallusion"})["h"]  # fmt: skip
    for name, last in (("fAcc", "figure_id"), ("qAcc", "question_id")):
        groups = {}
        for meta, good in zip(metas, right, strict=True):
            groups.setdefault(tuple(meta[k] for k in ("category", "subcategory", "set_id", last)), []).append(good)
        assert found[name]["value"] == pytest.approx(np.mean([all(group) for group in groups.values()]))


def test_repeats_are_grouped_one_by_one():
    # In each repeat one of the figure's two questions is right: no repeat has the figure right, though aAcc is 1/2.
    meta = [figure("map", "0", "0", q) for q in "01"]
    rows = [("hallusionbench", q, q == repeat, meta[q], {"repeat": repeat}) for q in (0, 1) for repeat in (0, 1)]
    found = figures(results(*rows))["hallusionbench"]
    assert (found["aAcc"]["value"], found["fAcc"]["value"], found["qAcc"]["value"]) == (0.5, 0, 0.5)
    assert found["repeats"] == 2 and found["questions"] == 2


def test_hallusionbench_needs_its_keys():
    with pytest.raises(ValueError, match="hallusion: questions without figure_id, question_id"):
        figures(results(("hallusionbench", 0, True, {"category": "VD", "subcategory": "map", "set_id": 0})))


def test_accuracy_is_a_mean_over_repeats_then_questions():
    rows = [("m", 0, True, {}, {"repeat": 0}), ("m", 0, False, {}, {"repeat": 1}), ("m", 1, True, {}, {"repeat": 0})]
    assert figures(results(*rows))["m"]["accuracy"]["value"] == 0.75  # not 2 of 3


def test_a_proportion_has_wilsons_interval():
    found = figures(results(*(("m", n, n < 5, {}) for n in range(10))))["m"]["accuracy"]
    # p = 1/2, n = 10: the half width is z / sqrt(n + z²) / 2 about 1/2.
    z = 1.959964
    half = z / np.sqrt(10 + z**2) / 2
    assert found["interval"] == pytest.approx([0.5 - half, 0.5 + half], abs=1e-4)
    assert figures(results(("m", 0, True, {})))["m"]["accuracy"]["interval"][0] < 0.5  # one hit is no certainty


def test_mmmu_pro_is_the_mean_of_its_parts_whatever_their_sizes():
    parts = [True, True, True, False], [False, True]
    rows = [
        ("mmmu_pro", f"{part}/{n}", right, {"part": part, "category": "Art"})
        for part, rights in zip(("standard", "vision"), parts, strict=True)
        for n, right in enumerate(rights)
    ]
    found = figures(results(*rows))["mmmu_pro"]
    assert (found["standard"]["value"], found["vision"]["value"]) == (0.75, 0.5)
    assert found["main"]["value"] == 0.625 != found["accuracy"]["value"]
    assert found["main"]["interval"][0] < 0.625 < found["main"]["interval"][1]


def test_mmmu_pro_without_a_part_has_no_figure():
    found = figures(results(("mmmu_pro", 0, True, {"part": "vision"})))
    assert found["mmmu_pro"]["main"] is None and found["mmmu_pro"]["missing"] == ["standard"]
    assert suite_average(found, ["mmmu_pro"]) == (None, ["mmmu_pro"])


def test_subsets_by_meta():
    rows = [("mmmu_val", n, n < 2, {"category": "Art" if n < 3 else "Music", "skills": ["a", "b"][: n % 2 + 1]})
            for n in range(4)]  # fmt: skip
    subsets = figures(results(*rows))["mmmu_val"]["subsets"]
    assert {k: (v["value"], v["questions"]) for k, v in subsets["category"].items()} == {
        "Art": (pytest.approx(2 / 3), 3),
        "Music": (0, 1),
    }
    assert {k: v["questions"] for k, v in subsets["skills"].items()} == {"a": 4, "b": 2}


def test_rates_and_failures_and_conditions():
    rows = [
        ("m", 0, None, {}, {"response": None, "problem": "failed"}),
        ("m", 1, False, {}, {"problem": "truncated"}),
        ("m", 2, True, {}, {"problem": "format"}),
        ("m", 3, True, {}),
        ("m", 3, False, {}, {"condition": "no_image"}),
    ]
    found = figures(results(*rows))["m"]
    assert found["rates"] == {"truncated": 0.25, "format": 0.25, "failed": 0.25} and found["failed"] == 1
    assert found["accuracy"]["value"] == 0.5 and found["questions"] == 4
    assert figures(results(*rows), condition="no_image")["m"]["accuracy"]["value"] == 0


def test_a_suite_has_an_average_only_when_it_is_whole():
    found = figures(results(("a", 0, True, {}), ("b", 0, False, {}), ("b", 1, False, {})))
    assert suite_average(found, ["a", "b"]) == (0.5, [])
    assert suite_average(found, ["a", "b", "c"]) == (None, ["c"])
    assert suite_average(found, ["a", "b"], {"a": 1, "b": 3}) == (None, ["b (2 of 3 questions)"])


def test_an_unknown_metric_is_an_error():
    with pytest.raises(ValueError, match="m: no metric f1"):
        figures(results(("m", 0, True, {})), {"m": "f1"})
