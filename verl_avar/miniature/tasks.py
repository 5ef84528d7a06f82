"""Verifiable tasks on the miniature's pictures, and the texts that go with them.

Each sample has a question, an answer that follows from the content of the picture, and a chain in the shape that VARD
gives its data (METHOD: AVAR §4.1, arXiv:2603.03825): describe what is there, then look at the image again for what the
question asks. The description names the shape first, then the colour, then the cell.
"""

import random
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
    thought = f"I see {describe(scene)}. Looking at the image again, {finding}."
    return Sample(task, question, thought, answer, scene.id, split, scenes.render(scene))


def describe(scene: Scene) -> str:
    """Every object in order of its cell: "circle red top left, cross blue middle centre"."""
    return ", ".join(f"{item.shape} {item.colour} {CELLS[item.cell]}" for item in scene.objects)


def _colour(split: str, rng: random.Random) -> tuple[Scene, str, str, str]:
    scene, target = _scene_with_one(split, rng, lambda item: item.shape)
    return (
        scene,
        f"What colour is the {target.shape}?",
        f"the {target.shape} is {target.colour}",
        target.colour,
    )


def _where(split: str, rng: random.Random) -> tuple[Scene, str, str, str]:
    scene, target = _scene_with_one(split, rng, lambda item: (item.shape, item.colour))
    cell = CELLS[target.cell]
    return (
        scene,
        f"Where is the {target.colour} {target.shape}?",
        f"the {target.shape} {target.colour} is at {cell}",
        cell,
    )


def _scene_with_one(split: str, rng: random.Random, key) -> tuple[Scene, Object]:
    """A scene and one of its objects that no other object equals under `key`."""
    while True:
        scene = scenes.draw_scene(rng, rng.choice(SIZES), split)
        keys = [key(item) for item in scene.objects]
        unique = [item for item in scene.objects if keys.count(key(item)) == 1]
        if unique:
            return scene, rng.choice(unique)


def _count(split: str, rng: random.Random) -> tuple[Scene, str, str, str]:
    """How many objects have a shape, or a colour; every number from 0 to MAX_COUNT equally likely."""
    kind = rng.choice(("shape", "colour"))
    wanted = rng.choice(SHAPES if kind == "shape" else tuple(COLOURS))
    number = rng.randint(0, MAX_COUNT)
    size = rng.choice([size for size in SIZES if size >= number])
    looks = [_look(rng, kind, wanted, matches=index < number) for index in range(size)]
    scene = scenes.draw_scene(rng, size, split, looks)
    found = [item for item in scene.objects if getattr(item, kind) == wanted]
    listed = ", ".join(f"{item.shape} {item.colour}" for item in found)
    question = f"How many {plural(wanted)} are there?" if kind == "shape" else f"How many {wanted} objects are there?"
    return scene, question, f"{listed or 'nothing'} makes {number}", str(number)


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
    thought = f"I see digit {value}. Looking at the image again, the digit is {value}."
    picture = digits.render(index, rng if split == "train" else None)
    return Sample("digit", "Which digit is written?", thought, value, f"digit:{index}", split, picture)
