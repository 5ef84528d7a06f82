"""Looks at the image: what is one and what is none, where they begin, and whether they name what is there."""

import time

import pytest

from verl_avar.errors import ConfigError
from verl_avar.synthesis.checks.anchors import Anchor, find_anchors, grounded_share
from verl_avar.synthesis.checks.words import content_words, singular

LOOKS = [
    "I see a circle at the top left.",
    "Looking at the image again, the cross is blue.",
    "Looking at the triangle again, AB and AC carry ticks.",
    "Let me check the image.",
    "Let me look more closely at the left branch.",
    "Looking again, the needle points to 7.",
    "Taking another look, the man holds a bag.",
    "On closer inspection, the two lines don't meet.",
    "In the figure, angle B is marked 40°.",
    "The chart shows four bars.",
    "As shown in the diagram, OM is perpendicular to AB.",
    "From the graph, the curve crosses zero at x = 2.",
    "I can clearly see two dogs.",
    "I count five red balls.",
    "We can see the owl at the top.",
    "I notice that the label 5 cm stands on the radius.",
    "Zooming in on the dial, it reads 30.",
    "Going back to the picture, the third row ends with a star.",
    "I should re-examine the drawing for hidden edges.",
    "Double-checking the axis of the chart, each step is 5.",
    "A small label is visible near B.",
    "The tail can be seen behind the tree.",
    "Let me verify this with the figure.",
    "Returning to the image, there's one woman only.",
    "Glancing back at the grid, row 3 lacks a star.",
    "Visually inspecting the sectors, orange is the widest.",
    "I'm looking at the number line now.",
    "Looking at the numbers on the dial, 7 is on top.",
    "From what I can see, the man wears a hat.",
    "Observing the image, the ball is in mid-air.",
    "Let me inspect the dial again.",
    "My eyes go to the red car.",
    "The bar for June, as seen in the chart, reaches 30.",
    "再看一下图，十字是蓝色的。",
    "从图中可以看出AB等于AC。",
    "我看到三个红色的球。",
    "如图所示，OM垂直于AB。",
    "让我仔细观察图像，箭头指向右边。",
    "重新检查左边的三角形，它是直角三角形。",
]
NO_LOOKS = [
    "So x equals 40.",
    "Looking at the equation again, x must be 3.",
    "Let me look at the options: A is 5 and B is 6.",
    "Looking at it another way, the sum is even.",
    "I see, so the ratio is one half.",
    "Now I see.",
    "I see why this fails.",
    "I see that I made a mistake in the sum.",
    "I notice a pattern: each term doubles.",
    "We see that x = 3 follows.",
    "We can see from the formula that h cancels.",
    "Let me check the calculation again.",
    "Let me double-check: 65 - 40 = 25.",
    "This looks like an arithmetic series.",
    "We look for the largest value.",
    "The problem says that in the figure AB is a diameter.",
    "The question asks what the image shows.",
    "Let me re-read the question.",
    "I figure that it is 5.",
    "We can picture a line through both points.",
    "Seen this way, the two cases are equal.",
    "Let's look at the case where x is negative.",
    "I read the problem again.",
    "Checking option B: 5 + 3 = 8.",
    "Looking back, I made an error.",
    "Looking at the numbers, 5 is the largest.",
    "Let me look at the second condition.",
    "I observe that 40 is twice 20.",
    "I see two possibilities here.",
    "Let me consult the table of values.",
    "The graph of y = x^2 is a parabola.",
    "Let me draw a figure for this.",
    "Let me see.",
    "再看一遍题目，要求的是面积。",
    "根据公式，面积是12。",
    "我注意到我算错了。",
]


@pytest.mark.parametrize("sentence", LOOKS)
def test_a_look_at_the_image_is_an_anchor(sentence):
    anchors = find_anchors(f"<think>Two sides are equal. {sentence} Half of it is 20.</think><answer>20</answer>")
    assert len(anchors) == 1
    assert sentence in anchors[0].text


@pytest.mark.parametrize("sentence", NO_LOOKS)
def test_other_thoughts_are_no_anchors(sentence):
    assert find_anchors(f"<think>Two sides are equal. {sentence} Half of it is 20.</think><answer>20</answer>") == []


def test_positions_are_where_the_sentences_begin_in_the_chain():
    chain = "I see a dog.\n\nIt is big.  Looking at the tail, it wags."
    assert len(chain) == 55
    expected = [Anchor("I see a dog.", 0.0), Anchor("Looking at the tail, it wags.", 26 / 55)]
    assert find_anchors(f"<think>{chain}</think><answer>In the image, a dog.</answer>") == expected
    assert find_anchors(chain) == expected  # a chain without its tags


def test_decimals_and_labels_do_not_end_a_sentence():
    (anchor,) = find_anchors("I see that side AB is 3.5 cm long, i.e. half of CD; add 7.")
    assert anchor.text == "I see that side AB is 3.5 cm long, i.e. half of CD;"


def test_a_look_that_names_nothing_goes_on_into_the_next_sentence():
    text = "Let me look at the image again. I see a red cube. So 5."
    assert find_anchors(text) == [Anchor("Let me look at the image again. I see a red cube.", 0.0)]
    assert [a.text for a in find_anchors("Let me look at the cube. I see a red cube.")] == [
        "Let me look at the cube.",
        "I see a red cube.",
    ]
    assert find_anchors("Let me look again.") == [Anchor("Let me look again.", 0.0)]


def test_further_phrases_of_a_config_and_bad_ones():
    assert find_anchors("My mind wanders to the door.") == []
    assert [a.position for a in find_anchors("My mind wanders to the door.", ["my MIND"])] == [0.0]
    assert [a.position for a in find_anchors("<think>So. <look>B2</look> is red.</think>", ["<look>"])] == [
        pytest.approx(4 / 27)
    ]
    with pytest.raises(ConfigError, match=r"checks.anchor.anchor_phrases: '\[' is not a regular expression"):
        find_anchors("", ["["])


def test_nothing_is_looked_at_in_an_empty_chain():
    assert find_anchors("") == find_anchors("<think></think><answer>5</answer>") == find_anchors("  \n ") == []


@pytest.mark.parametrize(
    ("plural", "one"),
    [
        ("boxes", "box"),
        ("circles", "circle"),
        ("cherries", "cherry"),
        ("dishes", "dish"),
        ("houses", "house"),
        ("dog's", "dog"),
        ("glass", "glass"),
        ("axis", "axis"),
        ("bus", "bus"),
        ("gas", "gas"),
        ("40", "40"),
    ],
)
def test_plurals_by_spelling(plural, one):
    assert singular(plural) == one


def test_content_words_name_things():
    assert content_words("Looking at the image again, I see 3 red circles and Tom's boxes.") == {
        "3",
        "red",
        "circle",
        "tom",
        "box",
    }
    assert content_words("Let me look at the image again, more closely.") == set()
    assert content_words("再看图，红色的球") == {"红色"}
    assert content_words("图中有红色圆球") == {"红色", "色圆", "圆球"}


def test_grounding_is_the_share_of_looks_that_name_what_the_description_names():
    looks = [Anchor("I see two red boxes.", 0.0), Anchor("Looking at the penguin, it swims.", 0.5)]
    assert grounded_share(looks, "A box stands on a table.") == 0.5
    assert grounded_share(looks, "A penguin beside a red box.") == 1
    assert grounded_share(looks, "An image that I see.") == 0
    assert grounded_share([Anchor("我看到红色圆球。", 0.0)], "左边有一个红色圆球") == 1


@pytest.mark.parametrize(
    "junk",
    [
        "looking " * 25_000,
        "checking the " * 16_000,
        "I see the " * 20_000,
        "look at the " * 17_000,
        "take a look at the " * 10_000,
        "图" * 100_000,
        "再看" * 100_000,
        "I see. " * 29_000,
        ". " * 100_000,
        "in the figure " * 14_000,
        "\n" * 200_000,
        "go back to my eyes' " * 10_000,
    ],
    ids=range(12),
)
def test_long_junk_is_searched_in_linear_time(junk):
    start = time.process_time()
    find_anchors(junk)
    assert time.process_time() - start < 2
