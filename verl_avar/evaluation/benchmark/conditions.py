"""What a question is asked under: as it is, under a bias of attention, or with images that tell less or nothing.

A benchmark answered as well without its images measures something else; a model that looks more at its images should
lose more when they are taken away.
"""

from __future__ import annotations

import hashlib
import io
import random
import re
from collections.abc import Callable, Sequence

from PIL import Image

from verl_avar.data.schema import IMAGE
from verl_avar.errors import ConfigError
from verl_avar.evaluation.benchmark.schema import CONTROLS, PLAIN

GREY = 128
GRID = 4  # a blacked-out image loses half of GRID × GRID cells
BIAS = re.compile(r"(visual_bias|system_bias)=(-?\d+(?:\.\d+)?)")


def check(condition: str) -> None:
    """Raises ConfigError for a condition that is not known."""
    if condition != PLAIN and condition not in CONTROLS and not biases(condition):
        known = ", ".join((PLAIN, *CONTROLS))
        raise ConfigError(
            f"condition '{condition}': known are {known}, visual_bias=0.14, system_bias=-0.5 and both by +"
        )


def biases(condition: str) -> dict[str, float]:
    """ "visual_bias=0.14+system_bias=-0.5" -> the options of `avar serve`'s requests; {} for any other condition."""
    parts = [BIAS.fullmatch(part) for part in condition.split("+")]
    return {part[1]: float(part[2]) for part in parts} if all(parts) else {}


def changed(question: dict, condition: str, others: Callable[[dict], Sequence[bytes]] | None) -> dict:
    """The row of schema.QUESTIONS as the condition has it.

    others: question -> the images that `other_image` gives it.
    """
    images = [image["bytes"] for image in question["images"]]
    if condition == PLAIN or biases(condition) or not images:
        return question
    if condition == "no_image":
        return question | {"images": [], "question": question["question"].replace(IMAGE, "").strip()}
    if condition == "grey_image":
        new = [grey(image) for image in images]
    elif condition == "other_image":
        new = list(others(question))
    else:
        new = [blackout(image, f"{question['id']} {number}") for number, image in enumerate(images)]
    return question | {"images": [{"bytes": image} for image in new]}


def grey(image: bytes) -> bytes:
    """A plain grey image of the same size."""
    with Image.open(io.BytesIO(image)) as picture:
        return _png(Image.new("RGB", picture.size, (GREY,) * 3))


def blackout(image: bytes, seed: str) -> bytes:
    """The image with half of its GRID × GRID cells black, drawn by the seed."""
    with Image.open(io.BytesIO(image)) as picture:
        picture = picture.convert("RGB")
    width, height = picture.size
    for cell in random.Random(seed).sample(range(GRID * GRID), GRID * GRID // 2):
        row, column = divmod(cell, GRID)
        box = (column * width // GRID, row * height // GRID, (column + 1) * width // GRID, (row + 1) * height // GRID)
        picture.paste((0, 0, 0), box)
    return _png(picture)


def donors(counts: dict[str, int]) -> dict[str, str]:
    """question id -> the question whose images it gets: another one with as many images, each giving once.

    counts: question id -> how many images it has. A question that is alone with its number of images keeps its own.
    """
    found = {}
    for number in sorted(set(counts.values())):
        ids = sorted((id_ for id_, count in counts.items() if count == number), key=_shuffled)
        found |= dict(zip(ids, ids[1:] + ids[:1], strict=True))
    return found


def _shuffled(id_: str) -> str:
    return hashlib.sha256(id_.encode()).hexdigest()


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
