"""The checks of a stage's text: each reason code, their order, and their settings."""

import itertools
import time

import pytest
from omegaconf import OmegaConf
from synthesis_chains import GOOD

from verl_avar.errors import ConfigError
from verl_avar.synthesis.checks import Context
from verl_avar.synthesis.checks.answers import wrong_answer
from verl_avar.synthesis.checks.settings import AnchorChecks, Checks, TextChecks
from verl_avar.synthesis.checks.stages import REASONS, check, check_settings
from verl_avar.synthesis.checks.words import foreign, loop_at_end, repeated_share, words

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


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("<think>two words</think>\n<answer>5</answer>", 3),
        ("it's 3.5 cm, or 1,000 well-known ones", 7),
        ("三角形ABC的角", 6),
        ("é à 'quoted' – dash", 4),
        ("삼각형 그림", 2),
        ("", 0),
    ],
)
def test_words_are_counted(text, count):
    assert len(words(text)) == count


@pytest.mark.parametrize(
    ("text", "scripts", "share", "script"),
    [
        ("plain English", ["latin"], 0, ""),
        ("Größe, naïve, ﬁn", ["latin"], 0, ""),
        ("angle α + θ = 180°, so △ABC, ℝ, 𝑥 and µ", ["latin"], 0, ""),
        ("红色 abcdefgh", ["latin"], 0.2, "han"),
        ("红色 abcdefgh", ["latin", "han"], 0, ""),
        ("红色 abcdefgh", [], 0, ""),
        ("在△ABC中，\\frac{x}{2} 等于 y", ["han"], 0, ""),
        ("<think>中文</think><answer>中</answer>", ["han"], 0, ""),
        ("ひらがな word", ["latin", "hiragana"], 0, ""),
        ("да, yes yes", ["latin"], 0.25, "cyrillic"),
        ("12 + 13 = 25", ["han"], 0, ""),
    ],
)
def test_foreign_letters_are_counted(text, scripts, share, script):
    assert foreign(text, scripts) == (pytest.approx(share), script)


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


def test_repeated_runs_worked_by_hand():
    # a b c d, b c d a, c d a b, d a b c, a b c d: the last of five stood before.
    assert repeated_share(list("abcdabcd")) == pytest.approx(1 / 5)
    assert repeated_share(list("AbcdaBcd")) == pytest.approx(1 / 5)
    assert repeated_share(list("abc")) == 0
    assert repeated_share([]) == 0
    assert repeated_share(list("红色圆红色圆红色圆")) == pytest.approx(1 / 4)  # runs of six characters


def slow_loop(tokens):
    """The definition, tried out: some unit of u words stands at the end max(5, 20 / u) times or more."""
    for unit in range(1, 65):
        length = max(20, 5 * unit)
        tail = tokens[-length:]
        if len(tail) == length and all(tail[i] == tail[i - unit] for i in range(unit, length)):
            return " ".join(tokens[-unit:])
    return None


@pytest.mark.parametrize("unit", [1, 2, 3, 7, 19])
@pytest.mark.parametrize("times", [1, 3, 4, 5, 9, 20])
@pytest.mark.parametrize("ending", ["", " the end"])
def test_loops_at_the_end_are_those_of_the_definition(unit, times, ending):
    text = "first comes this " + " ".join([f"w{i}" for i in range(unit)] * times) + ending
    assert loop_at_end(text) == slow_loop(text.split())


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


OPTIONS = ("3 cm", "5 cm", "7 cm", "\\frac{1}{2}")
RIGHT = [
    ("blue", "blue", ()),
    ("Blue.", "blue", ()),
    ("\\text{blue}", "blue", ()),
    ("B", "B", ()),
    ("(b)", "B", ()),
    ("B. 5 cm", "B", ()),
    ("B", "B. 5 cm", ()),
    ("5 cm", "B. 5 cm", ()),
    ("5 cm", "5", ()),
    ("5.0 cm", "5 cm", ()),
    ("1,234", "1234", ()),
    ("The answer is \\boxed{\\frac{2}{4}}", "\\frac{1}{2}", ()),
    ("$2\\sqrt{2}$", "\\sqrt{8}", ()),
    ("B", "B", OPTIONS),
    ("b", "B", OPTIONS),
    ("Option B", "(B)", OPTIONS),
    ("5 cm", "B", OPTIONS),
    ("B. 5 cm", "B", OPTIONS),
    ("(B) 5cm", "5 cm", OPTIONS),
    ("B", "5 cm", OPTIONS),
    ("B: the middle one", "B", OPTIONS),
    ("5 cm", "B. 5 cm", OPTIONS),
    ("B", "B) 5 cm", OPTIONS),
    ("0.5", "D", OPTIONS),
    ("Dog", "dog", ("cat", "dog")),
    ("B", "dog", ("cat", "dog")),
    ("B", "B", ("B", "A")),
    ("yellow", "yellow", ("red", "blue")),  # the row's answer is none of its options: compared as it stands
]
WRONG = [
    ("red", "blue", ()),
    ("not blue", "blue", ()),
    ("5", "5 cm", ()),
    ("5 km", "5 cm", ()),
    ("A", "B", ()),
    ("A and B", "B", ()),
    ("(A) and (B)", "A", ()),
    ("0.3333", "\\frac{1}{3}", ()),
    ("C", "B. 5 cm", ()),
    ("7 cm", "B. 5 cm", ()),
    ("A", "B", OPTIONS),
    ("7 cm", "B", OPTIONS),
    ("C. 7 cm", "5 cm", OPTIONS),
    ("B. 7 cm", "B", OPTIONS),
    ("C. 5 cm", "B", OPTIONS),
    ("5 cm or 7 cm", "B", OPTIONS),
    ("A", "B", ("B", "A")),  # as letters, not as texts
    ("A", "dog", ("cat", "dog")),
    ("", "blue", ()),
    ("\\boxed{", "blue", ()),
]


@pytest.mark.parametrize(("given", "truth", "choices"), RIGHT)
def test_right_answers(given, truth, choices):
    assert wrong_answer(f"<think>I see.</think><answer>{given}</answer>", truth, choices) is None


@pytest.mark.parametrize(("given", "truth", "choices"), WRONG)
def test_wrong_answers(given, truth, choices):
    assert wrong_answer(f"<think>It is {truth}.</think><answer>{given}</answer>", truth, choices)


def test_the_answer_of_a_long_chain_is_read():
    chain = "<think>" + "so it may be red, " * 200 + "</think><answer>The answer is blue.</answer>"
    assert wrong_answer(chain, "blue", ()) is None
    assert wrong_answer(chain, "red", ()) == "'blue' in place of 'red'"
    assert "1001 characters" in wrong_answer(f"<think>x</think><answer>{'b' * 1001}</answer>", "blue", ())


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
