"""What a question is asked under: as it is, under a bias of attention, or with images that tell less or nothing.

A benchmark answered as well without its images measures something else; a model that looks more at its images should
lose more when they are taken away. `blackout=0.25` and the like, shares from 0 to 1, are a curve: the same image with
more and more of it black.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence

from PIL import Image

from verl_avar.errors import ConfigError
from verl_avar.evaluation.benchmark.schema import CONTROLS, PLAIN

GREY = 128
GRID = 4  # an image is blacked out by GRID × GRID cells; `blackout` takes half of them
FINE = GRID * GRID  # the last cell of a share that is no whole number of cells goes by so many parts of it
BLACKOUT = re.compile(r"blackout=(0(?:\.\d+)?|1(?:\.0+)?)")
PLACEHOLDER = re.compile(r"<image ?\d*>")  # ours, and those that publishers' own texts keep
UNSEEN = "(image)"  # an option that was nothing but an image
BIAS = re.compile(r"(visual_bias|system_bias)=(-?\d+(?:\.\d+)?)")


def check(condition: str) -> None:
    """Raises ConfigError for a condition that is not known."""
    if condition not in (PLAIN, *CONTROLS) and blackout_share(condition) is None and not biases(condition):
        known = ", ".join((PLAIN, *CONTROLS))
        raise ConfigError(
            f"condition '{condition}': known are {known}, blackout=0.25 (a share from 0 to 1), visual_bias=0.14, "
            "system_bias=-0.5 and both by +"
        )


def biases(condition: str) -> dict[str, float]:
    """ "visual_bias=0.14+system_bias=-0.5" -> the options of `avar serve`'s requests; {} for any other condition."""
    parts = [BIAS.fullmatch(part) for part in condition.split("+")]
    return {part[1]: float(part[2]) for part in parts} if all(parts) else {}


def blackout_share(condition: str) -> float | None:
    """Which share of the image a condition blacks out: 0.25 of "blackout=0.25", half of "blackout"; None for others."""
    if condition == "blackout":
        return 0.5
    found = BLACKOUT.fullmatch(condition)
    return float(found[1]) if found else None


def changed(question: dict, condition: str, others: Callable[[dict], Sequence[bytes]] | None) -> dict:
    """The row of schema.QUESTIONS as the condition has it.

    others: question -> the images that `other_image` gives it.
    """
    images = [image["bytes"] for image in question["images"]]
    share = blackout_share(condition)
    if condition == PLAIN or share == 0 or biases(condition) or not images:
        return question
    if condition == "no_image":
        return without_images(question)
    if condition == "grey_image":
        new = [grey(image) for image in images]
    elif condition == "other_image":
        new = list(others(question))
    else:
        new = [blackout(image, f"{question['id']} {number}", share) for number, image in enumerate(images)]
    return question | {"images": [{"bytes": image} for image in new]}


def without_images(question: dict) -> dict:
    """The row without its images, and without their places in all that a protocol may print."""

    def bare(text: str) -> str:
        return PLACEHOLDER.sub("", text).strip()

    meta = json.loads(question["meta"])
    if "asked" in meta:
        meta["asked"] = bare(meta["asked"])
    return question | {
        "images": [],
        "question": bare(question["question"]),
        "choices": [bare(choice) or UNSEEN for choice in question["choices"]],
        "meta": json.dumps(meta, ensure_ascii=False, sort_keys=True),
    }


def grey(image: bytes) -> bytes:
    """A plain grey image of the same size."""
    with Image.open(io.BytesIO(image)) as picture:
        return _png(Image.new("RGB", picture.size, (GREY,) * 3))


def blackout(image: bytes, seed: str, share: float = 0.5) -> bytes:
    """The image with a share of it black: cells of a GRID × GRID grid in an order that the seed draws.

    A larger share has the cells of every smaller one. Of a cell that the share takes a part of, FINE parts go black in
    an order of their own: shares are exact to 1/256, images of less than 16 pixels a side aside.
    """
    with Image.open(io.BytesIO(image)) as picture:
        picture = picture.convert("RGB")
    width, height = picture.size
    order = random.Random(seed).sample(range(GRID * GRID), GRID * GRID)
    whole, part = divmod(round(share * GRID * GRID * FINE), FINE)
    parts = [(cell, range(FINE)) for cell in order[:whole]]
    if part:
        parts.append((order[whole], random.Random(f"{seed} {order[whole]}").sample(range(FINE), part)))
    for cell, inside in parts:
        for piece in inside:
            (row, column), (down, right) = divmod(cell, GRID), divmod(piece, GRID)
            left, top = GRID * column + right, GRID * row + down
            box = (left * width // FINE, top * height // FINE, (left + 1) * width // FINE, (top + 1) * height // FINE)
            if box[0] < box[2] and box[1] < box[3]:
                picture.paste((0, 0, 0), box)
    return _png(picture)


def donors(kinds: Mapping[str, tuple[int, str]]) -> dict[str, str]:
    """question id -> the question whose images it gets: another one of its kind, each giving once.

    kinds: question id -> how many images it has, and its category: the image of another kind of question would give
    itself away. Those alone in their category get images of any other with as many; one that is alone with its number
    of images is left out.
    """
    found = {}
    for number in sorted({number for number, _ in kinds.values()}):
        groups: dict[str, list[str]] = {}
        for id_, (count, category) in kinds.items():
            if count == number:
                groups.setdefault(category, []).append(id_)
        rings = [ids for ids in groups.values() if len(ids) > 1]
        alone = [ids[0] for ids in groups.values() if len(ids) == 1]
        if len(alone) > 1:
            rings.append(alone)
        elif alone and rings:
            found[alone[0]] = min((id_ for ids in rings for id_ in ids), key=_shuffled)
        for ids in rings:
            ids = sorted(ids, key=_shuffled)
            found |= dict(zip(ids, ids[1:] + ids[:1], strict=True))
    return found


def _shuffled(id_: str) -> str:
    return hashlib.sha256(id_.encode()).hexdigest()


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
