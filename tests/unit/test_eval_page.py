"""The report of benchmark runs and the page of flipped questions: what they say, hold, escape and never fetch."""

import base64
import hashlib
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from eval_folder import accuracy, questions, results, write_model, write_two
from PIL import Image
from synthesis_folder import HOSTILE, png

from verl_avar.errors import ConfigError
from verl_avar.evaluation.benchmark import diagnostics
from verl_avar.evaluation.benchmark.runs import read_run, read_runs
from verl_avar.evaluation.benchmark.table import build
from verl_avar.report import HeatmapSample
from verl_avar.report.eval_compare import GAINED, LOST, Flips, choose, compare, divided
from verl_avar.report.eval_overlays import stored_overlays
from verl_avar.report.eval_page import render_eval
from verl_avar.report.eval_verdicts import verdicts


class Page(HTMLParser):
    """Elements with their attributes, and the text of each section."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.sections, self.open = [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "section":
            self.sections.append(dict(attrs) | {"text": ""})
            self.open = True

    def handle_endtag(self, tag):
        self.open = self.open and tag != "section"

    def handle_data(self, data):
        if self.open:
            self.sections[-1]["text"] += data


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_two(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def out(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    render_eval(read_runs(folders), out, published={"AVAR-7B": "AVAR-Thinker"}, figures=accuracy)
    return out


@pytest.fixture(scope="module")
def compared(folders, tmp_path_factory):
    page = compare(folders, tmp_path_factory.mktemp("compared"))
    return page.read_text(encoding="utf-8")


def lines_of(runs, **table):
    return [line for lines in verdicts(runs, build(runs, figures=accuracy, **table)).values() for line in lines]


def test_verdicts_tell_gains_and_nothing_alike(folders):
    lines = lines_of(read_runs(folders))
    (gain,) = [line for line in lines if "points more" in line]
    assert gain.startswith("AVAR-7B answers 36.7 points more on MathVista (95 %: ")
    assert gain.endswith("12 questions gained, 1 lost.")
    (none,) = [line for line in lines if "no difference beyond chance" in line]
    assert "on MMStar (0.0 points" in none and "p 1.00 corrected" in none
    assert lines[0].startswith("AVAR-7B against Base-7B, average: +18.3 points")


def test_verdicts_of_a_worse_model_say_so(folders):
    (loss,) = [line for line in lines_of(read_runs(folders), base="AVAR-7B") if "points fewer" in line]
    low, high = map(float, re.search(r"95 %: ([\d.]+) to ([\d.]+)", loss).groups())
    assert loss.startswith("Base-7B answers 36.7 points fewer on MathVista") and 0 < low < 36.7 < high


def test_verdicts_warn_of_answers_cut_off_failed_calls_and_other_protocols(folders, tmp_path):
    runs = [read_run(folders[0]), read_run(write_model(tmp_path, "AVAR-7B", seed=7))]
    lines = lines_of(runs, published={"AVAR-7B": "AVAR-Thinker"})
    assert any(line.startswith("Base-7B: answers cut off") and "MathVista 13 %" in line for line in lines)
    assert any(line == "AVAR-7B: 1 of 50 calls failed; they count as wrong." for line in lines)
    assert any(line.startswith("Not one protocol: AVAR-7B was run with seed 7") for line in lines)
    assert any("from the published AVAR-Thinker (MMStar: 50.0 here, 64.1 published)" in line for line in lines)


def test_what_is_right_without_an_image_is_told_beside_guessing(folders, out):
    html = (out / "index.html").read_text(encoding="utf-8")
    # Right without an image 6 + 5 of 50, with it 12 + 10; 35 questions have four choices, 15 none.
    assert (
        "with no image 22.0 % are still right: 22.0 of its 44.0 points are language priors (guessing alone gives 17.5"
        in html
    )
    found = diagnostics.beside_plain(read_run(folders[0]), "no_image")
    assert found["mathvista"]["value"] == 6 / 30 and found["all"]["difference"] == pytest.approx((11 - 22) / 50)


def test_a_single_model_has_no_claim_of_a_gain(folders):
    lines = lines_of([read_run(folders[0])])
    assert "No base was run beside it" in lines[0] and not any("against" in line for line in lines)


def test_the_page_stands_alone(out):
    html = (out / "index.html").read_text(encoding="utf-8")
    page = Page(html)
    (policy,) = [attrs["content"] for tag, attrs in page.elements if tag == "meta" and "http-equiv" in attrs]
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    sources = [attrs["src"] for _, attrs in page.elements if "src" in attrs]
    assert len(sources) == 7 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not {"link", "iframe"} & {tag for tag, _ in page.elements}
    names = {"index.html", "table.md", "table.tex", "table.csv", "figures"}
    assert names <= {path.name for path in out.iterdir()}
    assert {path.stem for path in (out / "figures").iterdir()} == {
        "scores", "controls", "bias", "vas_benchmarks", "vas_samples", "vas_quintiles", "along"}  # fmt: skip


def test_only_differences_beyond_chance_stand_out_on_the_page(out):
    html = (out / "index.html").read_text(encoding="utf-8")
    marked = re.findall(r'<span class="delta clear[^"]*">([^<]*)</span>', html)
    assert marked == ["+36.7", "+18.3"] and '<span class="delta">0.0</span>' in html
    assert "published,<br>other protocol" in html and "74.7" in html


def test_what_a_figure_is_made_of_is_told(tmp_path):
    def of_parts(results, metrics):
        part = {"value": 0.25, "interval": None}
        return {name: one | {"aAcc": part, "fAcc": part} for name, one in accuracy(results, metrics).items()}

    run = read_run(write_model(tmp_path, "Base-7B"))
    html = render_eval([run], tmp_path / "report", figures=of_parts).read_text(encoding="utf-8")
    assert "What the figures of MathVista and MMStar are made of" in html
    assert html.count('fAcc <span class="number">25.0</span>') == 2


def test_figures_are_left_out_where_nothing_was_measured(tmp_path):
    bare = [one | {"vas": None, "attention_tokens": None} for one in results("AVAR-7B")]
    render_eval([read_run(write_model(tmp_path, "AVAR-7B", bare))], tmp_path / "report", figures=accuracy)
    assert [path.stem for path in (tmp_path / "report" / "figures").iterdir()] == ["scores"]
    assert "Attention along the response" not in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")


def test_hostile_names_are_text_on_the_page(tmp_path):
    run = read_run(write_model(tmp_path, "hostile", name=HOSTILE, protocol=HOSTILE))
    html = render_eval([run], tmp_path / "report", figures=accuracy).read_text(encoding="utf-8")
    assert [tag for tag, _ in Page(html).elements].count("script") == 1 and "<img src=x" not in html


def test_fifths_by_vas_and_course_along_the_response_are_as_made(folders):
    base = read_run(folders[0])
    answers = diagnostics.measured(base)
    assert [part["n"] for part in diagnostics.by_part(answers)] == [10] * 5
    # VAS is 0.4 higher where right: the right 12 of 30 and 10 of 20 fill the upper fifths.
    assert [part["value"] for part in diagnostics.by_part(answers)] == [0, 0, 0.2, 1, 1]
    assert all(one["auc"] == 1 for one in diagnostics.right_and_wrong(answers).values())
    values, count = diagnostics.along(base)
    plain = base.of()["vas"].mean()
    assert count == 50 and values[0] == pytest.approx(plain * (1.5 - 0.5 / 40)) and values[-1] < values[0]
    beta, point = diagnostics.bias_points(base)[1]
    assert beta == 0.14 and point["difference"] == pytest.approx((23 - 22) / 50)


def test_every_flip_is_counted_and_shown_with_both_answers(compared):
    sections = Page(compared).sections
    changes = [(one["data-benchmark"], one["data-change"]) for one in sections]
    assert {pair: changes.count(pair) for pair in changes} == {
        ("MathVista", GAINED): 12, ("MathVista", LOST): 1, ("MMStar", GAINED): 2, ("MMStar", LOST): 2}  # fmt: skip
    cells = re.findall(r'<td data-value="([^"]*)">([^<]*)</td>', compared)[:6]
    assert [text for _, text in cells] == ["MathVista", "11", "12", "1", "6", "13 of 13"]
    assert [value for value, _ in cells] == ["MathVista AVAR-7B", "11", "12", "1", "6", "13"]
    (lost,) = [one["text"] for one in sections if (one["data-benchmark"], one["data-change"]) == ("MathVista", LOST)]
    assert "Right answer: B" in lost and lost.count("Read as:") == 2 and "VAS 1.20" in lost and "VAS 0.80" in lost


def test_hostile_answers_and_questions_are_text(compared):
    page = Page(compared)
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)]
    sources = [attrs["src"] for _, attrs in page.elements if "src" in attrs]
    assert len(sources) == 17 and all(source.startswith("data:image/") for source in sources)
    (lost,) = [
        one["text"] for one in page.sections if (one["data-change"], one["data-benchmark"]) == (LOST, "MathVista")
    ]
    assert lost.count(HOSTILE) == 4  # question, choice, both chains


def test_the_flips_shown_are_few_and_the_same_whatever_the_order():
    ids = [str(n) for n in range(50)]
    found = Flips("m", "b", ids, ids[:3], 0, 0)
    shown = choose(found, 10, 0)
    assert [way for _, way in shown] == [GAINED] * 7 + [LOST] * 3
    assert choose(Flips("m", "b", ids[::-1], ids[:3], 0, 0), 10, 0) == shown != choose(found, 10, 1)
    assert [way for _, way in choose(Flips("m", "b", ids, ids, 0, 0), 10, 0)] == [GAINED] * 5 + [LOST] * 5
    assert len(choose(Flips("m", "b", ids[:1], ids[:2], 0, 0), 10, 0)) == 3


@pytest.mark.parametrize("response, parts", [
    ("<think>a</think><answer>B</answer>", ("a", "<answer>B</answer>")),
    ("a</think>B", ("a", "B")),
    ("<think>a </think> b</think> C", ("a </think> b", "C")),
    ("<think>I look and", ("I look and", "")),
    ("just B", (None, "just B")),
])  # fmt: skip
def test_a_response_is_divided_at_the_end_of_its_reasoning(response, parts):
    assert divided(response) == parts


def test_overlays_stand_beside_the_answers_they_are_of(folders, tmp_path):
    def overlay(model, question, response):
        if question["id"] != "12" or model != "AVAR-7B":
            return None
        picture = Image.open(io.BytesIO(question["images"][0]["bytes"]))
        return HeatmapSample(picture, "", [("<b>looks</b>", np.full((3, 4), 0.01))])

    html = compare(folders, tmp_path / "computed", overlays=overlay).read_text(encoding="utf-8")
    assert html.count("where it looks") == 1 and "&lt;b&gt;looks&lt;/b&gt;" in html and "<b>12.0 %</b>" in html
    stored = tmp_path / "overlays" / "AVAR-7B" / "mathvista" / "12.png"
    stored.parent.mkdir(parents=True)
    stored.write_bytes(png(0))
    html = compare(folders, tmp_path / "stored", overlays=stored_overlays(tmp_path / "overlays")).read_text("utf-8")
    assert html.count("where AVAR-7B looks") == 1


def test_comparing_needs_two_runs_and_their_questions(folders, tmp_path):
    with pytest.raises(ConfigError, match="two model folders or more"):
        compare(folders[:1], tmp_path)
    other = write_model(tmp_path, "AVAR-7B")
    (other / "questions.parquet").unlink()
    with pytest.raises(ConfigError, match=r"no questions\.parquet"):
        compare([folders[0], other], tmp_path / "out")


def test_a_question_that_the_run_does_not_hold_is_told(folders, tmp_path):
    other = write_model(tmp_path, "AVAR-7B", asked=questions()[:1] + questions()[30:])
    html = compare([folders[0], other], tmp_path / "out").read_text(encoding="utf-8")
    assert html.count("not among the run's questions") == 12
