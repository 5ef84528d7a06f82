"""Images taken away: more and more of them black, and all of them gone without a trace in what is asked."""

import io
from itertools import pairwise

import numpy as np
import pytest
from benchmark_copies import write_copies
from eval_folder import RIGHT, SIZES, accuracy, questions, result, write_model
from PIL import Image

from verl_avar.errors import ConfigError
from verl_avar.evaluation.benchmark import conditions, diagnostics
from verl_avar.evaluation.benchmark.definition import load_suite
from verl_avar.evaluation.benchmark.load import load
from verl_avar.evaluation.benchmark.predict import Settings, cases, write_questions
from verl_avar.evaluation.benchmark.prompts import messages
from verl_avar.evaluation.benchmark.runs import read_run
from verl_avar.report.eval_page import render_eval

SHARES = (0.0, 0.1, 0.25, 0.3, 0.5, 0.75, 0.99, 1.0)


def white(side=(64, 32)):
    buffer = io.BytesIO()
    Image.new("RGB", side, "white").save(buffer, "PNG")
    return buffer.getvalue()


def black(image):
    """bool [height, width]."""
    return np.asarray(Image.open(io.BytesIO(image)).convert("L")) == 0


def test_a_larger_share_blacks_out_all_that_a_smaller_one_does():
    masks = [black(conditions.blackout(white(), "q 0", share)) for share in SHARES]
    for less, more in pairwise(masks):
        assert (more | less == more).all() and more.sum() > less.sum()
    for share, mask in zip(SHARES, masks, strict=True):
        assert mask.mean() == pytest.approx(share, abs=1 / 512 + 1e-9)
    # Whole cells of a 4 × 4 grid where the share allows it.
    cells = masks[SHARES.index(0.25)].reshape(4, 8, 4, 16).mean((1, 3))
    assert sorted(cells.ravel()) == [0] * 12 + [1] * 4
    assert (black(conditions.blackout(white(), "q 1", 0.25)) != masks[SHARES.index(0.25)]).any()


def test_an_image_of_any_size_can_be_blacked_out():
    for side in ((1, 1), (3, 50), (17, 13)):
        assert black(conditions.blackout(white(side), "x", 1.0)).all()


def test_the_control_is_a_half_of_the_curve_and_no_share_is_the_plain_question():
    question = {"id": "7", "images": [{"bytes": white()}, {"bytes": white((20, 20))}]}
    half, control = (conditions.changed(question, name, None) for name in ("blackout=0.5", "blackout"))
    assert half == control != question
    assert conditions.changed(question, "blackout=0", None) is question
    assert conditions.blackout_share("blackout") == 0.5 and conditions.blackout_share("grey_image") is None


@pytest.mark.parametrize("condition", ["blackout=1.5", "blackout=-0.1", "blackout=", "blackout=a", "blackout=0.25+0.5"])
def test_a_share_is_between_none_and_all(condition):
    with pytest.raises(ConfigError, match=r"blackout=0\.25 \(a share from 0 to 1\)"):
        conditions.check(condition)


def test_shares_are_conditions_like_others(tmp_path):
    names = ("plain", "blackout=0", "blackout=0.25", "blackout", "blackout=0.5", "blackout=1.0")
    for name in names:
        conditions.check(name)
    write_questions(questions()[:1], tmp_path)
    found = {case.condition: case for case in cases(tmp_path, Settings("m", "m", "think", names), {})}
    keys = {name: found[name].key for name in names}
    # Asked alike, answered once.
    assert (
        keys["plain"] == keys["blackout=0"] and keys["blackout"] == keys["blackout=0.5"] and len({*keys.values()}) == 4
    )


@pytest.mark.parametrize("protocol", ["think", "direct", "harness", "miniature"])
def test_without_its_image_no_question_speaks_of_one_that_is_sent(tmp_path, protocol):
    write_copies(tmp_path)
    asked = [question for benchmark in load_suite("avar7") for question in load(benchmark, tmp_path)]
    assert any("<image>" in choice for question in asked for choice in question["choices"])
    for question in asked:
        told = messages(conditions.changed(question, "no_image", None), protocol)
        parts = told[-1]["content"]
        assert "<image" not in str(told) and [part["type"] for part in parts] == ["text"], question["id"]


def test_without_images_options_that_were_one_are_still_options():
    question = {"question": "<image>Which?", "choices": ["<image>", "<image>", "red <image>"],
                "images": [{"bytes": b""}], "meta": '{"asked": "See <image1> and <image>. Which?"}'}  # fmt: skip
    bare = conditions.changed(question, "no_image", None)
    assert bare["choices"] == ["(image)", "(image)", "red"] and bare["images"] == []
    assert bare["question"] == "Which?" and bare["meta"] == '{"asked": "See  and . Which?"}'


@pytest.fixture
def run(tmp_path):
    """The base plain, at 25 % as right as plain but for two questions, at 100 % with two right on each benchmark."""
    right = {"plain": RIGHT["Base-7B"], "blackout=0.25": {"mathvista": range(10), "mmstar": range(10)},
             "blackout=1": dict.fromkeys(SIZES, range(2)), "no_image": dict.fromkeys(SIZES, range(1))}  # fmt: skip
    rows = [result(q, int(q["id"]) in of[q["benchmark"]], name) for name, of in right.items() for q in questions()]
    return read_run(write_model(tmp_path, "Base-7B", rows))


def test_the_curve_is_of_the_same_questions(run):
    points = diagnostics.blackout_points(run)
    assert [(share, one["value"]) for share, one in points] == [(0, 22 / 50), (0.25, 20 / 50), (1, 4 / 50)]
    assert points[1][1]["difference"] == pytest.approx(-2 / 50) and points[0][1]["interval"] is None
    low, high = points[2][1]["own"]
    assert 0 < low < 4 / 50 < high < 0.2
    assert diagnostics.controls_of(run) == ["no_image"]


def test_the_control_alone_is_no_curve(tmp_path):
    rows = [result(q, True, name) for name in ("plain", "blackout") for q in questions()]
    assert diagnostics.blackout_points(read_run(write_model(tmp_path, "Base-7B", rows))) == []


def test_the_page_shows_the_curve_and_tells_where_it_falls(run, tmp_path):
    html = render_eval([run], tmp_path / "report", figures=accuracy).read_text(encoding="utf-8")
    assert (
        "Base-7B: with 0, 25, 100 % of the image black 44.0, 40.0, 8.0 % are right: a loss beyond chance from 100 %"
        in html
    )
    assert 'alt="The image blacked out"' in html and (tmp_path / "report" / "figures" / "blackout.png").is_file()
