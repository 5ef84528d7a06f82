"""The checks of a stage's text: each reason code, their order, and their settings."""

import itertools
import time

import pytest
from omegaconf import OmegaConf
from synthesis_chains import GOOD

from verl_avar.errors import ConfigError
from verl_avar.synthesis.checks import Context
from verl_avar.synthesis.checks.settings import AnchorChecks, Checks, TextChecks
from verl_avar.synthesis.checks.stages import REASONS, check, check_settings
from verl_avar.synthesis.checks.words import foreign, loop_at_end, words

DESCRIPTION = "circle red top left, cross blue middle centre"
CHAIN = (
    "<think>The description says circle red top left, cross blue middle centre. Checking the description again, it "
    "says cross blue middle centre.</think><answer>blue</answer>"
)
ANCHORED = (
    "<think>I see circle red top left, cross blue middle centre. Looking at the image again, I see cross blue middle "
    "centre.</think><answer>blue</answer>"
)
SCENE = Context("What colour is the cross?", "blue", (), DESCRIPTION, CHAIN)
SHORT = TextChecks(min_words=5)
SHORT_ANCHOR = AnchorChecks(min_words=5, min_anchors=1, min_spread=0)
PROSE = "A small harbour lies in the morning sun, with three boats tied to a wooden pier and gulls above the water."


def reason(stage, text, finish="stop", context=SCENE, settings=SHORT):
    problem = check(stage, text, finish, context, settings)
    return problem and problem.reason


def test_the_three_texts_of_a_small_scene_pass():
    assert check("describe", DESCRIPTION, "stop", SCENE, SHORT) is None
    assert check("reason", CHAIN, "stop", SCENE, SHORT) is None
    assert check("anchor", ANCHORED, "stop", SCENE, SHORT_ANCHOR) is None
    assert reason("anchor", CHAIN, settings=SHORT_ANCHOR) == "leak"


def test_settings_of_a_config_give_the_same_as_dataclasses():
    settings = OmegaConf.structured(Checks)
    for name, (context, text) in GOOD.items():
        assert check("anchor", text, "stop", context, settings.anchor) is None, name
    assert reason("anchor", ANCHORED.replace("blue</a", "red</a"), settings=settings.anchor) == "wrong_answer"


@pytest.mark.parametrize(
    ("text", "finish", "expected"),
    [
        ("", "stop", "empty"),
        (" \n ", "stop", "empty"),
        ("", "length", "truncated"),
        (PROSE, "length", "truncated"),
        ("", "content_filter", "refusal"),
        (PROSE, "content_filter", "refusal"),
        ("I'm sorry, but I can't help with that.", "stop", "refusal"),
        ("Тихая гавань лежит в лучах утреннего солнца, у причала три лодки.", "stop", "language"),
        ("A small red harbour.", "stop", "too_short"),
        (PROSE + " " + " ".join(str(i) for i in range(100)), "stop", "too_long"),
        ("A boat at the pier. " * 5, "stop", "repetition"),
        (PROSE, "stop", None),
        (PROSE, None, None),
    ],
)
def test_checks_of_every_stage(text, finish, expected):
    assert reason("describe", text, finish, settings=TextChecks(min_words=5, max_words=100)) == expected


def test_limits_are_themselves_allowed():
    text = " ".join(str(i) for i in range(20))
    assert reason("describe", text, settings=TextChecks(min_words=20, max_words=20)) is None
    assert reason("describe", text, settings=TextChecks(min_words=21)) == "too_short"
    assert reason("describe", text, settings=TextChecks(max_words=19, min_words=1)) == "too_long"


def test_refusals_can_be_let_through_but_filtered_texts_cannot():
    off = TextChecks(min_words=5, refusals=False)
    assert reason("describe", "I'm sorry, but I can't help with that.", settings=off) is None
    assert reason("describe", "I'm sorry, but I can't help", "content_filter", settings=off) == "refusal"


def test_unknown_writing_systems_are_a_mistake_in_the_config():
    with pytest.raises(ConfigError, match="scripts has 'english'"):
        foreign("text", ["english", "han"])
    with pytest.raises(ConfigError, match="scripts has 'english'"):
        check_settings(TextChecks(scripts=["english"]))
    check_settings(OmegaConf.structured(Checks).anchor)
    with pytest.raises(ConfigError, match="leak_phrases"):
        check_settings(AnchorChecks(leak_phrases=["["]))
    with pytest.raises(ConfigError, match="anchor_phrases"):
        check_settings(AnchorChecks(anchor_phrases=["*"]))


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        (PROSE + " the boat, the boat." * 20, True),
        (PROSE + "ha" * 200, True),
        (PROSE + "。红色" * 100, True),
        (PROSE + "!" * 300, True),
        (PROSE + " 1 + 1 + 1 + 1 = 4", False),
        (PROSE + " white" * 8, False),
        (PROSE, False),
    ],
)
def test_loops_of_words_and_characters(text, loops):
    assert (loop_at_end(text) is not None) == loops
    assert (reason("describe", text, settings=TextChecks(min_words=5, scripts=[])) == "repetition") == loops


def test_a_loop_at_the_end_of_the_reasoning_is_seen_before_a_good_answer():
    thoughts = " ".join(f"w{i}" for i in range(200)) + " wait no" * 15
    assert reason("reason", f"<think>{thoughts}</think><answer>blue</answer>") == "repetition"


def test_a_description_cell_by_cell_is_not_repetition():
    colours = ["red", "blue", "green", "white", "black"]
    cells = [
        f"Row {r}, column {c}: a {colours[(r * c + r) % 5]} piece." for r, c in itertools.product(range(8), repeat=2)
    ]
    assert reason("describe", " ".join(cells), settings=Checks().describe) is None


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("It is the blue one at the centre.", "<think> stands 0 times"),
        ("<think>one two three</think>four five", "<answer> stands 0 times"),
        ("<think>one two three</think><answer>a</answer><answer>blue</answer>", "<answer> stands 2 times"),
        ("So <think>one two three</think><answer>blue</answer>", "before <think>"),
        ("<think>one two three</think><answer>blue</answer> done", "after </answer>"),
        ("<think>one two three</think> so then <answer>blue</answer>", "does not follow"),
        ("<think> \n </think><answer>one two three four blue</answer>", "the reasoning is empty"),
        ("<think>one two three four five</think><answer> </answer>", "the answer is empty"),
        ("</think><think>one two three four<answer>blue</answer>", "before <think>"),
        ("<think>one two three four</answer><answer>blue</think>", "order"),
    ],
)
def test_what_breaks_the_format_is_said(text, detail):
    for stage, settings in (("reason", SHORT), ("anchor", SHORT_ANCHOR)):
        problem = check(stage, text, "stop", SCENE, settings)
        assert problem.reason == "format" and detail in problem.detail


def test_skipped_where_there_is_nothing_to_compare_with():
    bare = Context("What colour is the cross?", "blue")
    assert reason("anchor", ANCHORED, context=bare, settings=SHORT_ANCHOR) is None
    other = Context("?", "blue", (), "a penguin on ice", None)
    assert reason("anchor", ANCHORED, context=other, settings=SHORT_ANCHOR) == "ungrounded_anchors"


def test_length_is_compared_with_the_chain_both_ways():
    assert len(words(ANCHORED)) == 22
    for count, expected in ((10, "length_ratio"), (11, None), (44, None), (45, "length_ratio")):
        context = Context("?", "blue", (), DESCRIPTION, "word " * count)
        assert reason("anchor", ANCHORED, context=context, settings=SHORT_ANCHOR) == expected


def test_anchors_are_wanted_only_as_the_settings_say():
    none = "<think>Two and two are four, so it has to be the blue one.</think><answer>blue</answer>"
    free = AnchorChecks(min_words=5, min_anchors=0)
    assert reason("anchor", none, settings=free) is None
    assert reason("anchor", none, settings=SHORT_ANCHOR) == "no_anchors"
    assert reason("anchor", ANCHORED, settings=AnchorChecks(min_words=5, min_anchors=3)) == "few_anchors"
    assert reason("anchor", ANCHORED, settings=AnchorChecks(min_words=5, min_spread=0.6)) == "bunched_anchors"


def test_every_code_is_explained_in_one_line():
    for code, line in REASONS.items():
        assert code == code.lower() and line and "\n" not in line
    texts = "empty truncated refusal language too_short too_long repetition format wrong_answer"
    anchors = "leak no_anchors few_anchors bunched_anchors ungrounded_anchors length_ratio"
    others = "no_image bad_image no_question no_answer bad_row duplicate near_duplicate benchmark_overlap"
    assert set(REASONS) == {
        *texts.split(),
        *anchors.split(),
        *others.split(),
        "call_failed",
        "bad_request",
        "attention_low",
    }


def test_thousands_of_chains_are_checked_in_seconds():
    rows = list(itertools.islice(itertools.cycle(GOOD.values()), 2000))
    settings = AnchorChecks()
    start = time.process_time()
    for context, text in rows:
        check("anchor", text, "stop", context, settings)
    assert time.process_time() - start < 4


@pytest.mark.parametrize(
    "junk",
    [
        "<think>" * 28_000,
        "<think>" + "a " * 100_000,
        "<think>" + "a " * 100_000 + "</think> x <answer>blue</answer>",
        "<think>a</think>" + " " * 200_000 + "<answer>" + " " * 200_000 + "</answer>",
        "<think>I see.</think><answer>answer is " + " " * 200_000 + "x</answer>",
        "<think>" + " " * 200_000 + "</think><answer>blue</answer>",
        "<think>" + "\\frac{" * 30_000 + "</think><answer>blue</answer>",
        "<think>" + "é" * 200_000 + "</think><answer>blue</answer>",
        "<think>" + "a-" * 100_000 + "</think><answer>" + "9" * 900 + "</answer>",
        "</think>" * 10_000 + "<answer>" * 10_000,
        "红" * 200_000,
        "\x00\ufffd\u202e" * 60_000,
    ],
    ids=range(12),
)
def test_long_junk_is_checked_in_linear_time(junk):
    start = time.process_time()
    loose = AnchorChecks(min_words=0, max_words=10**9, max_repeated=1, scripts=["latin"], max_foreign=1)
    for stage, settings in (("describe", loose), ("reason", loose), ("anchor", loose)):
        check(stage, junk, "stop", SCENE, settings)
    assert time.process_time() - start < 3
