"""The exact teacher of the miniature's scenes: a describer, a reasoner and an anchorer that are rules, not models.

The three stages of VARD (AVAR §4.1, arXiv:2603.03825) on pictures whose content is known. The describer reads the
scene that `data.write_questions` put into the PNG file's text; the reasoner knows nothing but a description and a
question; the anchorer rewrites text and knows no more than it. Together they write the chains of `tasks.Sample`.
Each can be made to err, where a caller gives the random numbers that decide how.
"""

from __future__ import annotations

import io
import random
import re
from collections.abc import Sequence

from PIL import Image, UnidentifiedImageError

from verl_avar.miniature import digits, tasks
from verl_avar.miniature.scenes import CELLS, COLOURS, SHAPES, Object, Scene

SCENE_KEY = "scene"  # of the PNG text chunk
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I cannot assist with this request.",
    "As an AI language model, I am unable to view or discuss this content.",
)
# How the reasoner appeals to the description, and what the anchorer writes in its place. In the order of the chain.
APPEALS = (
    ("The description says", "I see"),
    ("Checking the description again, it says", "Looking at the image again, I see"),
)
_OBJECT = re.compile(rf"({'|'.join(SHAPES)}) ({'|'.join(COLOURS)}) ({'|'.join(CELLS)})")
_DIGIT = re.compile(r"digit (\d)")
_COLOUR = re.compile(rf"What colour is the ({'|'.join(SHAPES)})\?")
_WHERE = re.compile(rf"Where is the ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\?")
_COUNT = re.compile(r"How many (.+) are there\?")
_NAMES = {tasks.plural(shape): ("shape", shape) for shape in SHAPES} | {
    f"{colour} objects": ("colour", colour) for colour in COLOURS
}


class CannotAnswer(ValueError):
    """A picture, description or question that is not the miniature's."""


def read_scene(picture: bytes) -> str:
    """The scene that the PNG file names in its own text. Raises CannotAnswer where it names none."""
    try:
        with Image.open(io.BytesIO(picture)) as image:
            scene = image.info.get(SCENE_KEY)
    except UnidentifiedImageError:
        raise CannotAnswer("this is no picture that can be read") from None
    if not isinstance(scene, str):
        raise CannotAnswer(f"the picture has no '{SCENE_KEY}' in its text: only the miniature's scenes are known")
    return scene


def describe(scene: str) -> str:
    """A description of a scene given by its id: "circle red top left, cross blue middle centre", "digit 7".

    Raises CannotAnswer for what is not the id of a scene.
    """
    kind, _, index = scene.partition(":")
    try:
        if kind == "digit":
            return f"digit {digits.label(int(index))}"
        objects = [(int(cell), shape, colour) for cell, shape, colour in (part.split(":") for part in scene.split("|"))]
        known = all(cell in range(len(CELLS)) and shape in SHAPES and look in COLOURS for cell, shape, look in objects)
        if known:
            return tasks.describe(Scene(tuple(Object(*item) for item in objects)).objects)
    except (ValueError, IndexError):
        pass  # said below
    raise CannotAnswer(f"'{scene[:80]}' is not a scene")


def reason(description: str, question: str, mistake: random.Random | None = None) -> str:
    """The chain and answer that follow from a description: `<think>…</think><answer>…</answer>`.

    mistake: given, the chain misreads what it looks for and gives another answer of the same kind, always a wrong one.
    Raises CannotAnswer for a description or question that is not the miniature's, or that doesn't settle the answer.
    """
    finding, answer, possible = _find(description, question)
    if mistake is not None:
        wrong = mistake.choice([value for value in possible if value != answer])
        finding, answer = finding.replace(answer, wrong), wrong
    said, checked = (appeal for appeal, _ in APPEALS)
    return f"<think>{said} {description}. {checked} {finding}.</think><answer>{answer}</answer>"


def anchor(chain: str, leak: random.Random | None = None) -> str:
    """The chain with looks at the image in place of appeals to the description; everything else stays.

    leak: given, one of the appeals that the chain has survives.
    """
    found = [pair for pair in APPEALS if pair[0] in chain]
    if leak is not None and found:
        found.remove(leak.choice(found))
    for appeal, look in found:
        chain = chain.replace(appeal, look)
    return chain


def _find(description: str, question: str) -> tuple[str, str, Sequence[str]]:
    """What the description says about the question, the answer, and all answers that such a question may have."""
    if question == "Which digit is written?":
        if not (match := _DIGIT.fullmatch(description)):
            raise CannotAnswer(f"the description names no digit: '{description[:80]}'")
        return description, match[1], [str(value) for value in range(10)]
    objects = _objects(description)
    if match := _COLOUR.fullmatch(question):
        target = _only([item for item in objects if item.shape == match[1]], match[1])
        return tasks.describe([target]), target.colour, tuple(COLOURS)
    if match := _WHERE.fullmatch(question):
        looks = [item for item in objects if (item.colour, item.shape) == match.groups()]
        target = _only(looks, " ".join(match.groups()))
        return tasks.describe([target]), CELLS[target.cell], CELLS
    if (match := _COUNT.fullmatch(question)) and match[1] in _NAMES:
        attribute, value = _NAMES[match[1]]
        found = [item for item in objects if getattr(item, attribute) == value]
        possible = [str(number) for number in range(tasks.MAX_COUNT + 1)]
        return f"{tasks.describe(found)}, which makes {len(found)}", str(len(found)), possible
    raise CannotAnswer(f"not one of the miniature's questions: '{question[:80]}'")


def _objects(description: str) -> list[Object]:
    if description == tasks.describe([]):
        return []
    matches = [_OBJECT.fullmatch(part) for part in description.split(", ")]
    if not all(matches):
        raise CannotAnswer(f"the description is not of the miniature's shapes: '{description[:80]}'")
    return [Object(CELLS.index(match[3]), match[1], match[2]) for match in matches]


def _only(objects: list[Object], words: str) -> Object:
    if len(objects) != 1:
        raise CannotAnswer(f"the description has {len(objects)} objects that are '{words}'; the question means one")
    return objects[0]
