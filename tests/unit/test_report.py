"""The report: what its lines claim, what the table and page hold, and what a heat map shows, on made-up results."""

import copy
import io
import re

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from verl_avar.report import HeatmapSample, print_table, render, verdicts
from verl_avar.report.heatmaps import attention_heatmap


def stage(name, accuracy, shuffled, response_vas, visual, system, paper=9.0):
    scopes = {
        "user": {"paper": paper, "head_mean": 0.8 * response_vas, "median": 0.7 * response_vas},
        "response": {"paper": 1.5 * paper, "head_mean": response_vas, "median": 0.9 * response_vas},
    }
    return {
        "name": name,
        "accuracy": {"all": accuracy, "colour": accuracy + 0.1, "where": accuracy, "count": accuracy - 0.1},
        "shuffled": {"all": shuffled, "colour": shuffled, "where": shuffled, "count": shuffled},
        "samples": 400,
        "vas": scopes,
        "mass": {"visual": visual, "system": system},
        "seconds": 95.0,
    }


def make_results() -> dict:
    return {
        "stages": [
            stage("base", 0.08, 0.07, 1.5, 0.30, 0.20),
            stage("coldstart", 0.66, 0.22, 2.0, 0.32, 0.16),
            stage("coldstart_agto", 0.67, 0.21, 6.0, 0.40, 0.0667, paper=4100.0),
            stage("avar", 0.78, 0.22, 6.6, 0.42, 0.064, paper=5200.0),
        ],
        "rl": [
            {"step": n, "reward": 1 + n / 50, "acc": 0.6 + n / 100, "format": 0.97, "visual": 0.4 + n / 60,
             "visual_ratio": 0.6 + n / 60, "visual_mass": 0.4, "system_mass": 0.07}
            for n in range(1, 21)
        ],
        "notes": ["Trained on <made-up> scenes."],
        "config": {"seed": 1, "out": "runs/x"},
    }  # fmt: skip


def make_sample() -> HeatmapSample:
    image = Image.fromarray(np.full((84, 84, 3), 240, dtype=np.uint8))
    image.paste((200, 30, 30), (28, 0, 56, 28))
    first, second = np.full((3, 3), 0.02), np.full((3, 3), 0.03)
    second[0, 1] = 0.4
    steps = [("I need the colour of the square.", first), ("Looking at the image again, the square is red.", second)]
    return HeatmapSample(image, "What colour is the square?", steps, stage="avar", truth="red")


@pytest.fixture
def results() -> dict:
    return make_results()


def said(results: dict) -> str:
    return "\n".join(verdicts(results))


def test_agto_line_gives_the_factor_and_its_cause(results):
    line = next(line for line in verdicts(results) if line.startswith("AGTO raised the head-averaged VAS"))
    assert "2.00 to 6.00 (3.00×)" in line
    assert line.endswith(
        "so mostly by attending less to the system prompt."
    )  # 1.25x from looking, 2.4x from suppressing
    results["stages"][2]["mass"] = {"visual": 0.90, "system": 0.15}
    assert "so mostly by attending more to the image." in said(results)


def test_lowered_and_unchanged_attention_are_said(results):
    results["stages"][2]["vas"]["response"]["head_mean"] = 1.0
    assert "AGTO lowered the head-averaged VAS of the response: 2.00 to 1.00 (0.50×)." in verdicts(results)
    results["stages"][2]["vas"]["response"]["head_mean"] = 2.02
    assert "AGTO left unchanged the head-averaged VAS" in said(results)


def test_gain_within_chance_is_no_gain(results):
    text = said(results)  # 0.66 to 0.67 of 400 samples: two standard errors are 6.7 points
    assert "No accuracy gain from AGTO was seen: 66.0 % to 67.0 %; chance explains ±6.7 points" in text
    assert "GRPO with VARS raised accuracy: 67.0 % to 78.0 %." in text


def test_lost_accuracy_is_said(results):
    results["stages"][3]["accuracy"]["all"] = 0.5
    assert "GRPO with VARS lowered accuracy: 67.0 % to 50.0 %." in verdicts(results)


@pytest.mark.parametrize(
    ("accuracy", "reading"),
    [(0.60, "answers from the image"), (0.35, "uses the image, but little"), (0.23, "no use of the image")],
)
def test_grounding_is_read_off_the_shuffled_control(results, accuracy, reading):
    results["stages"] = [stage("coldstart", accuracy, 0.22, 2.0, 0.3, 0.2)]
    assert reading in said(results)


def test_exploded_mean_of_ratios_is_pointed_out(results):
    # the worst is the last stage's response: 1.5 * 5200 over 6.6
    assert "(AVAR (GRPO, VARS), response scope: 7,800, head-averaged 6.60)" in said(results)
    for record in results["stages"]:
        for scope in record["vas"].values():
            scope["paper"] = 2 * scope["head_mean"]
    assert "mean of per-head ratios" not in said(results)


def test_rl_line_compares_the_ends_of_the_run(results):
    # accuracy of steps 1-5 is 0.63 on average, of steps 16-20 0.78
    assert "accuracy 0.630 to 0.780" in said(results)


def test_table_fits_a_narrow_and_a_wide_terminal(results):
    for width in (80, 200):
        console = Console(width=width, file=io.StringIO(), record=True)
        print_table(results, console)
        text = console.export_text()
        assert "66.0" in text and "cold start" in text
        assert max(len(line.rstrip()) for line in text.splitlines()) <= width


def test_page_is_self_contained_and_complete(results, tmp_path):
    page = render(results, tmp_path, [make_sample()])
    assert page == tmp_path / "report" / "index.html"
    html = page.read_text(encoding="utf-8")
    sources = re.findall(r'(?:src="|href="|url\()(.{22})', html)  # figures, the image once, a veil a step
    assert len(sources) == 4 + 1 + 2 and set(sources) == {"data:image/png;base64,"}
    assert "Trained on &lt;made-up&gt; scenes." in html
    assert "Looking at the image again, the square is red." in html
    figures = {path.name for path in (page.parent / "figures").iterdir()}
    assert figures == {"accuracy.png", "vas.png", "mass.png", "rl.png", "heatmap_1.png"}


def test_the_page_links_to_pages_below_it(results, tmp_path):
    page = render(results, tmp_path, links=[("The rows", tmp_path / "report" / "evaluation" / "index.html")])
    assert '<a href="evaluation/index.html">The rows</a>' in page.read_text(encoding="utf-8")


def test_a_run_without_attention_or_rl_is_still_reported(results, tmp_path):
    for record in results["stages"]:
        del record["vas"], record["mass"], record["shuffled"]
    del results["rl"]
    results["stages"][0]["seconds"] = float("nan")
    page = render(results, tmp_path)
    assert {path.name for path in (page.parent / "figures").iterdir()} == {"accuracy.png"}
    assert "Reinforcement" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda r: r.update(stages=[]), "stages"),
        (lambda r: r["stages"][1].pop("accuracy"), r"stages\[1\]"),
        (lambda r: r["rl"][4].pop("step"), r"rl\[4\]"),
    ],
)
def test_bad_results_are_named_and_nothing_is_written(results, tmp_path, spoil, named):
    bad = copy.deepcopy(results)
    spoil(bad)
    with pytest.raises(ValueError, match=named):
        render(bad, tmp_path)
    assert not any(tmp_path.iterdir())


def test_heatmap_unveils_the_cell_looked_at():
    weights = make_sample().steps[1][1]
    picture = np.asarray(attention_heatmap(Image.new("RGB", (84, 84), "white"), weights)).astype(int).sum(-1)
    cell = picture.shape[0] // 3
    means = picture.reshape(3, cell, 3, cell).mean((1, 3))
    assert np.unravel_index(means.argmax(), means.shape) == (0, 1)
    assert means.max() == 3 * 255  # the image's own white


def test_heatmaps_of_one_sample_share_their_scale():
    faint, strong = np.full((2, 2), 0.1), np.full((2, 2), 0.2)
    image = Image.new("RGB", (56, 56), "white")
    dim, bright = (np.asarray(attention_heatmap(image, weights, 0.2)).astype(int).sum() for weights in (faint, strong))
    assert dim < bright
    assert np.asarray(attention_heatmap(image, faint)).astype(int).sum() == bright  # alone, it is scaled to itself


@pytest.mark.parametrize("weights", [np.ones(4), np.array([[0.1, -0.1]]), np.array([[np.nan]])])
def test_heatmap_refuses_what_is_no_grid_of_weights(weights):
    with pytest.raises(ValueError, match="rows, columns"):
        attention_heatmap(Image.new("RGB", (56, 56)), weights)
