"""`avar vas` as table, findings, figures and page, on made-up results: what they claim and hold, odd cases included."""

import copy
import io
import re

import numpy as np
import pytest
from rich.console import Console
from test_report import make_sample

from verl_avar.report import HeatmapSample, vas_figures
from verl_avar.report.drawing import literal
from verl_avar.report.vas_page import failures, print_vas, render_vas, strongest_heads
from verl_avar.report.vas_results import model_names
from verl_avar.report.vas_verdicts import vas_verdicts


def make_scope(rng, layers: int, heads: int, vas: float, classed: bool) -> dict:
    depth = np.linspace(0.2, 1, layers)[:, None]
    visual = 0.3 * depth * rng.random((layers, heads))
    system = 0.2 + 0.3 * rng.random((layers, heads))
    ratio = visual / system
    ratio *= vas / ratio.mean()
    head_mean = visual.mean(1) / system.mean(1)
    return {
        "vas": vas,
        "class": "narrow" if classed else None,
        "interval": [0.9 * vas, 1.1 * vas],
        "head_mean": head_mean.mean(),
        "head_mean_interval": [0.95 * head_mean.mean(), 1.05 * head_mean.mean()],
        "median": 0.9 * head_mean.mean(),
        "mass": {"visual": visual.mean(), "system": system.mean(), "user": 0.1, "response": 0.2},
        "by_layer": {
            "vas": ratio.mean(1).tolist(),
            "head_mean": head_mean.tolist(),
            "visual": visual.mean(1).tolist(),
            "system": system.mean(1).tolist(),
        },
        "by_head": {"vas": ratio.tolist(), "visual": visual.tolist(), "system": system.tolist()},
        "samples": 198,
        "skipped": 2,
        "queries": 4000,
        "sinks": {
            "share": 0.05,
            "tokens": 3.2,
            "mass_share": 0.41,
            "vas": 0.6 * vas,
            "head_mean": 0.6 * head_mean.mean(),
            "visual": 0.6 * visual.mean(),
            "border_share": 0.18,
            "no_border_vas": 0.8 * vas,
            "no_border_head_mean": 0.8 * head_mean.mean(),
            "no_border_visual": 0.8 * visual.mean(),
        },
    }


def make_vas(layers=4, heads=2, model="models/Tiny-VL", vas=7.5, tokens=40, seed=0) -> dict:
    """What `avar vas` writes, made up: heads and layers differ, attention to the image falls along the response."""
    rng = np.random.default_rng(seed)
    fall = np.exp(-np.arange(tokens) / tokens)
    return {
        "schema": 1,
        "model": model,
        "model_type": "qwen2_5_vl",
        "data": "questions.jsonl",
        "dtype": "float32",
        "layers": list(range(layers)),
        "heads": heads,
        "samples": 200,
        "planned": 203,
        "failed": [{"row": "7", "reason": "no image file"}, {"row": "9", "reason": "no image file"},
                   {"row": "12", "reason": "broken <jpeg> & more"}],
        "skipped": [],
        "seconds": 93.1,
        "notes": ["A note on <this> run."],
        "scopes": {
            "user": make_scope(rng, layers, heads, vas, True),
            "response": make_scope(rng, layers, heads, 1.5 * vas, False),
        },
        "positions": {
            "position": list(range(tokens)),
            "n": np.linspace(200, 3, tokens).round().astype(int).tolist(),
            "visual": (0.21 * fall).tolist(),
            "system": (0.3 * fall).tolist(),
            "user": (0.2 * fall).tolist(),
            "response": (1 - 0.71 * fall - 0.02).tolist(),
            "head_mean": np.full(tokens, 0.7).tolist(),
        },
        "decay": {"first": 0.21, "last": 0.14, "slope_per_100": -0.03},
    }  # fmt: skip


@pytest.fixture
def result() -> dict:
    return make_vas()


def without_system_turn(result: dict) -> dict:
    """What a model gives whose chats have no system turn: masses, no ratios."""
    for scope in result["scopes"].values():
        for key in ("vas", "class", "interval", "head_mean", "head_mean_interval", "median", "sinks"):
            scope[key] = None
        scope["mass"]["system"] = 0.0
        for table in (scope["by_layer"], scope["by_head"]):
            table.update({key: None for key in table if key not in ("visual", "system")})
        scope["by_layer"]["system"] = [0.0] * len(result["layers"])
    result["positions"]["head_mean"] = [None] * len(result["positions"]["n"])
    return result


def printed(results: list[dict], width: int = 80, names: list[str] | None = None) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    print_vas(results, names, console)
    return console.export_text()


def said(*results: dict) -> str:
    return "\n".join(vas_verdicts(results, model_names(results)))


def texts(figure) -> str:
    """All words of a figure."""
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def test_lines_say_what_was_measured(result):
    scope = result["scopes"]["response"]
    scope["mass"] |= {"visual": 0.142, "system": 0.265}
    text = said(result)
    assert "The response gives the image 14.2 % of its attention, less than the system turn (26.5 %)" in text
    assert "VAS of the user turn: 7.50 (95 %: 6.75–8.25), narrow." in text
    assert "attention to the image falls, 21.0 % to 14.0 % (-3.0 points per 100 tokens)" in text
    assert "In the response, of the attention to the image, 3.2 sink tokens a sample take 41.0 %, border" in text
    assert "3 of 203 rows failed, most often (2×): no image file." in text


def test_strongest_layers_and_head_are_those_of_the_arrays(result):
    scope = result["scopes"]["response"]
    scope["by_layer"]["visual"] = [0.1, 0.4, 0.05, 0.3]
    scope["by_head"]["visual"][2][1] = 0.9
    result["layers"] = [3, 7, 11, 15]  # only some were measured
    line = next(line for line in said(result).splitlines() if line.startswith("Most attention"))
    assert "layers 7, 15, 3 (40.0, 30.0, 10.0 %); least: layer 11 (5.0 %)" in line
    assert "strongest head: 1 of layer 11 (90.0 %)" in line
    assert strongest_heads(result, "response")[0][:3] == ["11", "1", "90.0"]


def test_a_model_without_sinks_is_told_so(result):
    result["scopes"]["response"]["sinks"] |= {"tokens": 0.0, "mass_share": 0.0}
    result["scopes"]["user"]["sinks"] |= {"tokens": 0.0, "mass_share": 0.0}
    text = said(result)
    assert "no image token is a sink; of the attention to the image, border cells take 18.0 %; head-avera" in text
    assert "without sinks" not in text + said(result, copy.deepcopy(result))
    assert "without sinks" not in texts(vas_figures.robustness([result], ["x"]))


def test_a_gate_is_not_reported_as_a_part_of_attention(result):
    result |= {"cross_attention": True, "model_type": "mllama"}
    for scope in result["scopes"].values():
        scope["mass"] |= {"visual": 0.7, "system": 0.6}  # more than a whole
    text = said(result)
    assert "The response has a gated visual mass of 70.0 %; the user turn has a gated visual mass of 70.0 %." in text
    assert "than the system turn" not in text and "last quarter" not in text and "strongest head" not in text
    assert vas_figures.masses([result], ["x"]) is None and vas_figures.head_map(result, "user") is None
    assert strongest_heads(result, "response") == []


def test_failures_of_different_reasons_are_told_by_one(result):
    result["failed"] = result["failed"][1:]
    assert "2 of 203 rows failed, for example: no image file." in said(result)


def test_an_interval_that_reaches_another_class_says_so(result):
    result["scopes"]["user"] |= {"vas": 9.5, "interval": [8.5, 10.5]}
    assert "9.50 (95 %: 8.50–10.5), narrow, and perhaps wide." in said(result)
    result["scopes"]["user"] |= {"vas": 19.0, "interval": [4.8, 39.0], "class": "panoramic"}
    assert "19.0 (95 %: 4.80–39.0), panoramic, and perhaps narrow or wide." in said(result)


@pytest.mark.parametrize(("last", "verb"), [(0.205, "holds"), (0.1, "falls"), (0.3, "rises")])
def test_decay_is_told_by_its_size(result, last, verb):
    result["decay"]["last"] = last
    assert f"attention to the image {verb}, 21.0 % to {100 * last:.1f} %" in said(result)


def test_a_paper_mean_that_one_head_decides_is_pointed_out():
    result = make_vas(6, 5)
    scope = result["scopes"]["response"]
    scope["by_head"]["vas"][4][2] = 9e5
    scope["vas"] = float(np.mean(scope["by_head"]["vas"]))
    line = next(line for line in said(result).splitlines() if line.startswith("The paper's VAS"))
    assert "is decided by few heads (response: 30,0" in line
    assert "half of it comes from 1 of 30 heads, 100 % from head 2 of layer 4" in line


def test_a_paper_mean_near_the_head_averaged_one_is_not_complained_of(result):
    for scope in result["scopes"].values():
        scope["vas"] = 2 * scope["head_mean"]
    assert "The paper's VAS" not in said(result)


def test_comparison_gives_factor_intervals_and_cause(result):
    other = copy.deepcopy(result)
    other["model"] = "models/AVAR"
    for record, visual, system in ((result, 0.10, 0.20), (other, 0.20, 0.19)):
        scope = record["scopes"]["response"]
        scope["mass"] |= {"visual": visual, "system": system}
        scope["head_mean"] = visual / system
        scope["head_mean_interval"] = [0.9 * visual / system, 1.1 * visual / system]
        scope["sinks"]["head_mean"] = 0.5
    text = said(result, other)
    assert "AVAR against Tiny-VL, response: head-averaged VAS 0.500 to 1.05 (2.11×, 95 % intervals apart)" in text
    assert "without sinks 1.00×; visual mass 10.0 % to 20.0 %, system mass 20.0 % to 19.0 %" in text
    assert "mostly by attending more to the image" in text
    assert "95 % intervals overlap" in said(result, copy.deepcopy(result))


def test_without_a_system_turn_there_are_masses_and_no_vas(result):
    bare = without_system_turn(result)
    assert "No sample has a system turn to compare with, so there is no VAS." in said(bare)
    text = printed([bare])
    assert re.search(r"VAS \(paper's\) +│ +– │ +– │", text)
    assert "None" not in text and "nan" not in text
    assert vas_figures.robustness([bare], ["x"]) is None
    assert vas_figures.by_position([bare], ["x"]) is not None
    assert texts(vas_figures.head_map(bare, "user")).count("VAS") == 0


def test_when_every_row_failed_the_reason_is_all_there_is(result, tmp_path):
    result |= {"samples": 0, "scopes": {}, "positions": None, "decay": None}
    result["failed"] = [{"row": str(n), "reason": "cannot open image"} for n in range(203)]
    assert said(result).splitlines() == [
        "Nothing was measured.",
        "203 of 203 rows failed, all: cannot open image.",
    ]
    assert "0 (203)" in printed([result])
    page = render_vas(result, [], tmp_path)
    assert "cannot open image" in page.read_text(encoding="utf-8")
    assert not any((tmp_path / "figures").iterdir())


def test_reasons_of_failure_are_counted_and_their_number_is_bounded(result):
    result["failed"] = [{"row": str(n), "reason": f"odd {n}"} for n in range(50)] + [
        {"row": f"r{n}", "reason": "usual"} for n in range(7)
    ]
    result["skipped"] = [{"row": "s", "reason": "no image"}]
    listed = failures(result)
    assert listed[0] == ("usual", 7, "r0, r1, r2, r3, r4, …")
    assert len(listed) == 20 and listed[-1][:2] == ("33 other reasons", 33)
    assert sum(count for _, count, _ in listed) == 58


@pytest.mark.parametrize("count", [1, 2, 3, 9])
@pytest.mark.parametrize("width", [80, 160])
def test_table_fits_the_terminal(count, width):
    results = [make_vas(model=f"/checkpoints/some/Model-{n}-7B-Instruct", seed=n) for n in range(count)]
    text = printed(results, width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert "7.50" in text and "…" not in text


def test_two_results_stand_side_by_side_with_their_change(result):
    other = copy.deepcopy(result)
    other["scopes"]["user"] |= {"vas": 15.0, "class": "panoramic"}
    other["scopes"]["user"]["mass"]["visual"] = result["scopes"]["user"]["mass"]["visual"] + 0.032
    text = printed([result, other], names=["base", "AVAR [tuned]"])
    assert "AVAR [tuned]" in text  # not taken for markup
    assert re.search(r"VAS \(paper's\) +│ +7.50 narrow │ +15.0 panoramic │ +2.00× │", text)
    assert "+3.2 pts" in text


def test_names_are_as_much_of_the_path_as_tells_models_apart():
    paths = ["runs/a/step_100", "runs/b/step_100", "other/x/step_7"]
    assert model_names([{"model": path} for path in paths]) == ["a/step_100", "b/step_100", "x/step_7"]
    assert model_names([{"model": path} for path in ("/x/m", "/x/m", "/x/n")]) == ["m (1)", "m (2)", "n"]
    assert model_names([{"model": "/x/m", "name": "a/b"}, {"model": "/x/m"}]) == ["a/b", "m"]  # a given name is whole


def test_results_on_different_rows_are_not_compared_in_silence(result):
    other = copy.deepcopy(result) | {"samples": 5}
    assert "Not measured on the same rows" in said(result, other)
    assert "Tiny-VL (1) 200 rows of questions.jsonl, Tiny-VL (2) 5 rows of questions.jsonl" in said(result, other)
    assert "same rows" not in said(result, copy.deepcopy(result))


def test_results_over_different_layers_are_not_compared_in_silence(result):
    text = said(result, make_vas(2))
    assert "Not measured over the same layers, which may make a difference of its own: Tiny-VL (1) 4, Tiny-" in text
    other = make_vas(2) | {"model_type": "gemma3"}
    assert "same layers" not in said(result, other) + said(result, copy.deepcopy(result))


def test_a_note_says_whose_it_is_unless_it_is_of_all(result):
    other = copy.deepcopy(result) | {"model": "models/AVAR"}
    assert "• A note on <this> run." in printed([result, other])
    other["notes"] = ["Rows left out: 3."]
    text = printed([result, other])
    assert "• Tiny-VL: A note on <this> run." in text and "• AVAR: Rows left out: 3." in text


def test_names_are_drawn_as_they_are(tmp_path):
    results = [make_vas() | {"name": "_costs $x_{$"}, make_vas() | {"name": "[/red]"}]
    html = render_vas(results[1], [], tmp_path, others=results[:1]).read_text(encoding="utf-8")
    assert "_costs $x_{$" in html and "[/red]" in printed(results)
    legend = vas_figures.by_layer(results, [literal("_costs $x_{$"), "b"]).axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [r" _costs \$x_{\$", "b"]


def test_a_page_leaves_no_figures_of_an_earlier_one(result, tmp_path):
    render_vas(result, [make_sample(), make_sample()], tmp_path)
    render_vas(result, [make_sample()], tmp_path)
    assert [path.name for path in sorted((tmp_path / "figures").glob("heatmap*"))] == ["heatmap_1.png"]


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda r: r.update(schema=2), "schema 2"),
        (lambda r: r.pop("layers"), "layers"),
        (lambda r: r["scopes"].update(visual={}), "scopes.visual"),
        (lambda r: r["scopes"].update(user="x"), "scopes.user"),
        (lambda r: r["scopes"]["user"]["by_head"].update(vas=[[1.0]]), "scopes.user.by_head.vas"),
        (lambda r: r["scopes"]["user"]["by_layer"].update(system=[1.0]), "scopes.user.by_layer.system"),
    ],
)
def test_bad_results_are_named_and_nothing_is_written(result, tmp_path, spoil, named):
    spoil(result)
    with pytest.raises(ValueError, match=named):
        render_vas(result, [], tmp_path)
    assert not any(tmp_path.iterdir())


def test_no_results_or_too_few_names_are_refused(result):
    with pytest.raises(ValueError, match="no results"):
        print_vas([])
    with pytest.raises(ValueError, match="1 names for 2"):
        print_vas([result, result], ["base"])


def test_page_is_self_contained_and_complete(result, tmp_path):
    sample = make_sample()
    asked = HeatmapSample(sample.image, "Is <b>AB</b> < 5 & why?", sample.steps, truth="<5>")
    page = render_vas(result, [asked, sample], tmp_path)
    assert page == tmp_path / "index.html"
    html = page.read_text(encoding="utf-8")
    sources = re.findall(r'(?:src="|href="|url\()(.{22})', html)
    assert len(sources) == 6 + 2 * (1 + 2) and set(sources) == {"data:image/png;base64,"}
    assert "Is &lt;b&gt;AB&lt;/b&gt; &lt; 5 &amp; why?" in html and "<b>AB" not in html
    assert "broken &lt;jpeg&gt; &amp; more" in html and "A note on &lt;this&gt; run." in html
    assert "7.50 narrow" in html
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    drawn = {
        f"{name}.png" for name in ("masses", "robustness", "by_layer", "heads_user", "heads_response", "by_position")
    }
    assert figures == drawn | {"heatmap_1.png", "heatmap_2.png"}


def test_a_page_can_compare_with_other_results(result, tmp_path):
    base = make_vas(model="models/base", seed=5)
    html = render_vas(result, [], tmp_path, others=[base]).read_text(encoding="utf-8")
    assert "<th>base</th><th>Tiny-VL</th><th>change</th>" in html
    assert "Tiny-VL against base" in html


@pytest.mark.parametrize(("layers", "heads", "tokens"), [(1, 1, 1), (1, 4, 7), (64, 32, 700)])
def test_any_number_of_layers_heads_and_positions_is_drawn(layers, heads, tokens, tmp_path):
    result = make_vas(layers, heads, tokens=tokens)
    result["layers"] = [2 * layer for layer in range(layers)]
    render_vas(result, [], tmp_path)
    assert (tmp_path / "figures" / "heads_user.png").exists() == (layers * heads > 1)  # one head needs no map
    drawn = vas_figures.by_layer([result], ["x"]).axes[0].lines[0]
    np.testing.assert_allclose(drawn.get_xdata(), result["layers"])
    np.testing.assert_allclose(drawn.get_ydata(), result["scopes"]["user"]["by_layer"]["head_mean"])


def test_parts_that_were_not_measured_are_left_out(result, tmp_path):
    del result["scopes"]["user"]
    result |= {"positions": None, "decay": None, "seconds": None, "failed": [], "notes": []}
    html = render_vas(result, [], tmp_path).read_text(encoding="utf-8")
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {
        "masses",
        "robustness",
        "by_layer",
        "heads_response",
    }
    assert "Rows left out" not in html and "user turn" not in html.split("<h2>Where attention goes")[1].split("<h2>")[1]
    assert "along the response" not in printed([result])


def test_results_are_laid_over_each_other_with_their_names(result):
    other = make_vas(6, 2, model="models/deeper", seed=4)
    names = ["base", "deeper"]
    lines = vas_figures.by_layer([result, other], names).axes[1].lines
    assert [line.get_label() for line in lines] == names
    assert len({line.get_color() for line in lines}) == len({line.get_linestyle() for line in lines}) == 2
    np.testing.assert_allclose(lines[1].get_ydata(), 100 * np.array(other["scopes"]["response"]["by_layer"]["visual"]))
    assert "attention to the image, %" in texts(vas_figures.by_position([result, other], names))


@pytest.mark.parametrize("width", [1, 3, 7, 100])
def test_bins_are_means_weighted_by_samples(width):
    rng = np.random.default_rng(width)
    n, values = rng.integers(1, 9, 20), rng.random(20)
    positions = {"position": list(range(20)), "n": n.tolist(), "visual": values.tolist()}
    positions["visual"][4] = None
    at, means, counts = vas_figures.binned(positions, "visual", width)
    for index, start in enumerate(range(0, 20, width)):
        inside = [p for p in range(start, min(20, start + width))]
        known = [p for p in inside if p != 4]
        assert at[index] == pytest.approx(np.mean(inside)) and counts[index] == pytest.approx(np.mean(n[inside]))
        expected = sum(n[p] * values[p] for p in known) / sum(n[known]) if known else np.nan
        assert means[index] == pytest.approx(expected, nan_ok=True)


def test_head_map_shows_the_arrays_and_rings_the_strongest(result):
    figure = vas_figures.head_map(result, "response")
    by_head = result["scopes"]["response"]["by_head"]
    for axes, values in zip(
        figure.axes[:2], (100 * np.array(by_head["visual"]), np.array(by_head["vas"])), strict=True
    ):
        np.testing.assert_allclose(axes.images[0].get_array(), values.T)
        ring = axes.lines[-1].get_xydata()[0]
        assert tuple(ring) == np.unravel_index(values.argmax(), values.shape)


def test_a_head_without_any_visual_attention_does_not_break_the_log_scale(result):
    by_head = result["scopes"]["response"]["by_head"]
    by_head["vas"][0][0] = 0.0
    vas_figures.head_map(result, "response").savefig(io.BytesIO())
    by_head["vas"] = np.zeros((4, 2)).tolist()
    vas_figures.head_map(result, "response").savefig(io.BytesIO())
