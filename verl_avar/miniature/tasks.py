"""Verifiable tasks on the miniature's pictures, and the texts that go with them.

Each sample has a question, an answer that follows from the content of the picture, and a chain in the shape that VARD
gives its data (AVAR §4.1, arXiv:2603.03825): describe what is there, then look at the image again for what the
question asks. The description names the shape first, then the colour, then the cell.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from verl_avar.miniature import digits, scenes
from verl_avar.miniature.scenes import CELLS, COLOURS, SHAPES, Object, Scene

SYSTEM = "You are a careful assistant. Look at the image, think, then answer."
TASKS = ("colour", "where", "count", "digit")
SIZES = (2, 3, 4)  # objects in a scene
MAX_COUNT = 3
CAPTION = "Describe the image."


@dataclass(frozen=True)
class Sample:
    """One picture with a question about it. `scene` identifies the picture's content."""

    task: str
    question: str
    thought: str
    answer: str
    scene: str
    split: str
    image: Image.Image

    @property
    def response(self) -> str:
        return f"<think>{self.thought}</think><answer>{self.answer}</answer>"


def draw_sample(task: str, split: str, rng: random.Random) -> Sample:
    """A random sample of one task from one split ("train" or "eval").

    Raises ValueError for an unknown task or split.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"unknown split {split!r}; known: train, eval")
    if task == "digit":
        return _digit(split, rng)
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    scene, question, finding, answer = {"colour": _colour, "where": _where, "count": _count}[task](split, rng)
    thought = f"I see {describe(scene.objects)}. Looking at the image again, I see {finding}."
    return Sample(task, question, thought, answer, scene.id, split, scenes.render(scene))


def describe(objects: Sequence[Object]) -> str:
    """The objects in the order given: "circle red top left, cross blue middle centre", or "nothing"."""
    return ", ".join(f"{item.shape} {item.colour} {CELLS[item.cell]}" for item in objects) or "nothing"


def scene_with_one(split: str, rng: random.Random, by: str) -> tuple[Scene, Object, str]:
    """A scene, one of its objects, and the words that single it out: its shape, or (`by` "look") colour and shape."""
    while True:
        scene = scenes.draw_scene(rng, rng.choice(SIZES), split)
        words = [item.shape if by == "shape" else f"{item.colour} {item.shape}" for item in scene.objects]
        unique = [pair for pair in zip(scene.objects, words, strict=True) if words.count(pair[1]) == 1]
        if unique:
            return scene, *rng.choice(unique)


def scene_with_some(split: str, rng: random.Random) -> tuple[Scene, list[Object], str]:
    """A scene, its objects of one shape or colour, and their name ("crosses", "red objects").

    Every number of such objects from 0 to MAX_COUNT is equally likely.
    """
    kind = rng.choice(("shape", "colour"))
    wanted = rng.choice(SHAPES if kind == "shape" else tuple(COLOURS))
    number = rng.randint(0, MAX_COUNT)
    size = rng.choice([size for size in SIZES if size >= number])
    looks = [_look(rng, kind, wanted, matches=index < number) for index in range(size)]
    scene = scenes.draw_scene(rng, size, split, looks)
    found = [item for item in scene.objects if getattr(item, kind) == wanted]
    return scene, found, plural(wanted) if kind == "shape" else f"{wanted} objects"


def _colour(split: str, rng: random.Random) -> tuple[Scene, str, str, str]:
    scene, target, words = scene_with_one(split, rng, by="shape")
    return scene, f"What colour is the {words}?", describe([target]), target.colour


def _where(split: str, rng: random.Random) -> tuple[Scene, str, str, str]:
    scene, target, words = scene_with_one(split, rng, by="look")
    return scene, f"Where is the {words}?", describe([target]), CELLS[target.cell]


def _count(split: str, rng: random.Random) -> tuple[Scene, str, str, str]:
    scene, found, name = scene_with_some(split, rng)
    return scene, f"How many {name} are there?", f"{describe(found)}, which makes {len(found)}", str(len(found))


def _look(rng: random.Random, kind: str, wanted: str, matches: bool) -> tuple[str, str]:
    """A (shape, colour) that does, or does not, have the wanted shape or colour."""
    values = {"shape": SHAPES, "colour": tuple(COLOURS)}
    look = {name: rng.choice(options) for name, options in values.items()}
    look[kind] = wanted if matches else rng.choice([value for value in values[kind] if value != wanted])
    return look["shape"], look["colour"]


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _digit(split: str, rng: random.Random) -> Sample:
    index = digits.draw_digit(rng, split)
    value = str(digits.label(index))
    thought = f"I see digit {value}. Looking at the image again, I see digit {value}."
    picture = digits.render(index, rng if split == "train" else None)
    return Sample("digit", "Which digit is written?", thought, value, f"digit:{index}", split, picture)
