"""Leaks and refusals: what gives a description away, how refusals begin, and what only resembles them."""

import time

import pytest

from verl_avar.errors import ConfigError
from verl_avar.synthesis.checks.leaks import find_leak
from verl_avar.synthesis.checks.refusals import find_refusal

LEAKS = [
    "According to the description, the triangle is isosceles.",
    "The description says that the cat is on the left.",
    "The image description mentions three circles.",
    "the given description doesn’t state the radius.",
    "The cube is red, as described.",
    "As previously described, the bar for May reaches 30.",
    "Based on the caption, this is a harbour.",
    "The text provided says the radius is 5.",
    "The provided text mentions a ball only.",
    "The text describes a blue sphere at the back.",
    "Let me re-read the description carefully.",
    "Let me check the description\nagain to be sure.",
    "Wait, the visual description puts B to the left of C.",
    "Option C matches the description.",
    "I only have a description, so I go by that.",
    "The car is described as red.",
    "In the described scene, two men wait.",
    "All the objects described are round.",
    "Since I can't see the image, I assume a right angle.",
    "I don't have access to the image, so I infer it.",
    "Without seeing the image, we can't be sure.",
    "No image was provided, so let me imagine it.",
    "This follows from the description of the image.",
    "Description: a circle and a cross. So it is the circle.",
    "Per the description, M is the midpoint.",
    "My description lists four sectors.",
    "The captions confirm that.",
    "The image is described as showing three dogs.",
    "From what's described, the angle is right.",
    "It's described that the boy holds a kite.",
    "So the image description in the question says AB = 5.",
    "The image, as described, shows a cat.",
    "Based on the textual information, x is 5.",
    "Without the image, I rely on these words.",
    "The user provided a description of a chart.",
    "根据描述，三角形是等腰的。",
    "描述中提到红色的圆在左边。",
    "图片描述显示有三个球。",
    "正如描述所说，门是开着的。",
    "我无法看到图片，只能猜测。",
]
INNOCENT = [
    "The problem describes a circle of radius 5.",
    "The described circle touches all three sides.",
    "Let the circle described about the triangle have radius R.",
    "The problem description says that AB = AC.",
    "The description in the question says that AB = AC.",
    "The point moves as described in the problem.",
    "As described by Newton's second law, F = ma.",
    "As described above, each row shifts to the left.",
    "The motion is described by the equation x = 3t.",
    "In the question, the solid is described as a cone.",
    "The curve can be described as a parabola.",
    "This matches the description of a rhombus.",
    "The description of option B is too narrow.",
    "The text on the sign reads STOP.",
    "According to the text on the label, it holds 2 litres.",
    "The provided text box is empty, \\text{cm} is the unit.",
    "The caption below the photo reads 'Lisbon 1910'.",
    "The image shows what the question describes.",
    "Looking at the image again, the cross is blue.",
    "I cannot see the hidden side of the cube in the image.",
    "I can't see the image of the candle behind the mirror... it is virtual.",
    "A non-descript grey box stands at the left.",
    "Light falls on the lens as the figure shows, so the text book formula holds.",
    "This process is described as mitosis.",
    "I see a poster with a description of the museum beside the door.",
    "The sign gives a description of a castle.",
    "If no picture is given for B, we skip it.",
    "The best description of the trend is linear growth.",
    "The text in the speech bubble says hello.",
    "函数图像描述了速度的变化。",
    "题目描述中说AB等于AC。",
    "看图，圆在左边，说明半径是5。",
]


@pytest.mark.parametrize("text", LEAKS)
def test_mentions_of_a_description_are_leaks(text):
    assert find_leak(f"<think>We look. {text} So it is.</think><answer>5</answer>", "What is x?")
    assert find_leak(text, "What is x?")


@pytest.mark.parametrize("text", INNOCENT)
def test_innocent_uses_are_no_leaks(text):
    assert find_leak(f"<think>We look. {text} So it is.</think><answer>5</answer>", "What is x?") is None


def test_a_question_about_descriptions_lets_them_be_named_but_not_be_the_source():
    asked = "Which description of the cat is right?"
    assert find_leak("The first of these descriptions fits.", asked) is None
    assert find_leak("The first of these descriptions fits.", "What is x?")
    assert find_leak("According to the description, it sleeps.", asked)


def test_a_question_about_a_caption_lets_it_be_quoted():
    assert find_leak("The caption says harbour.", "Read the caption under the photo.") is None
    assert find_leak("The caption says harbour.", "Where is this?")


def test_a_question_with_a_passage_lets_the_text_be_named():
    assert find_leak("According to the text, whales are mammals.", "Read the passage and look at the picture.") is None
    assert find_leak("According to the text, whales are mammals.", "Which animal is it?")


def test_a_leak_is_shown_with_its_surroundings():
    assert find_leak("a " * 500 + "As described, it is red." + " b" * 500, "") == (
        "a a a a a a a a a a a a a a a as described, it is red. b b b b b b b b b"
    )


def test_further_phrases_of_a_config_and_bad_ones():
    assert find_leak("The scene graph has a node.", "", ["scene graph"])
    assert find_leak("The Scene  graph has a node.", "", [r"scene\s+graph"]).startswith("The Scene graph")
    with pytest.raises(ConfigError, match=r"checks.anchor.leak_phrases: '\(caption' is not a regular expression"):
        find_leak("", "", ["(caption"])
    with pytest.raises(ConfigError, match="leak_phrases: 'x\\*'"):
        find_leak("", "", ["x*"])


REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I’m sorry. I cannot identify the person.",
    "Sorry, this request goes against my guidelines.",
    "I apologize, but the picture is not something I may describe.",
    "My apologies, this image cannot be shown.",
    "Unfortunately, I am unable to view images.",
    "I cannot assist with this request.",
    "I can't process this image.",
    "I won't provide a description of this content.",
    "As an AI language model, I do not have eyes.",
    "As a text-based assistant I only read.",
    "I don't see any image in your message.",
    "No image was provided. Please attach one.",
    "It seems that the image didn't upload.",
    "Please provide the image that you want described.",
    "**I must decline** to answer.",
    "<think>I'm sorry, I can't help with that.</think><answer>none</answer>",
    "<think>A triangle.</think><answer>I'm sorry, but I can't answer that.</answer>",
    "<think>A triangle.</think>\nI cannot see the image.",
    "抱歉，我无法回答这个问题。",
    "作为一个人工智能助手，我没有眼睛。",
    "我无法查看图片。",
    "请提供图片。",
]
NO_REFUSALS = [
    "<think>Let me see. I cannot see the hidden side of the cube, but I know it is blue.</think><answer>blue</answer>",
    "<think>I can't see the image itself, but the description says that it is red.</think><answer>red</answer>",
    "I cannot determine the area directly, so I split the figure in two.",
    "I can't help noticing that both triangles share a side.",
    "I can't answer the question without the radius. The radius is 5, from the label.",
    "A sign in the window says: Sorry, we are closed.",
    "No pictures hang on the wall; a lamp stands on the table.",
    "It looks like the image was taken at dusk, by the sea.",
    "As a model of the solar system, the drawing shows nine planets.",
    "The image shows a person who apologizes to a child.",
    "We cannot see the image of the object, since the image is virtual.",
    "Unfortunately the left third of the photo is blurred; the rest shows a harbour.",
    "Please Mr. Postman is written on the record's sleeve, a photo of four singers.",
    "<think>The man says that he is sorry. I am unable to read the sign.</think><answer>A</answer>",
    "我无法确定角度，所以先看图。",
    "作为一个等腰三角形，它的两个底角相等。",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals_are_told_by_how_they_begin(text):
    assert find_refusal(text)


@pytest.mark.parametrize("text", NO_REFUSALS)
def test_what_only_sounds_like_a_refusal_is_none(text):
    assert find_refusal(text) is None


@pytest.mark.parametrize(
    "junk",
    [
        "the " * 50_000,
        "description " * 17_000,
        "the image description of the " * 7_000,
        "described as " * 15_000,
        "is described as described " * 8_000,
        " " * 200_000 + "text",
        "描述" * 100_000,
        "根据" * 100_000 + "描述了",
        "as was described by " * 10_000,
        "caption" * 28_000,
    ],
    ids=range(10),
)
def test_long_junk_is_searched_in_linear_time(junk):
    start = time.process_time()
    find_leak(junk, "")
    find_refusal(junk)
    assert time.process_time() - start < 2
