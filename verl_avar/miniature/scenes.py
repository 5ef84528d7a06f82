"""Coloured shapes on a 3×3 grid: images whose content the code knows.

A scene is a few objects in different cells. The picture is 84×84 pixels and a cell 28, which is one visual token of the
miniature model (patch 14, merge 2), so that a scene has exactly as many visual tokens as cells.
"""

import hashlib
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

GRID = 3
CELL_PX = 28
IMAGE_PX = GRID * CELL_PX
OVERSAMPLING = 3  # shapes are drawn larger and scaled down, which gives them soft edges

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 200),
    "yellow": (250, 210, 30),
    "purple": (150, 60, 190),
}
SHAPES = ("circle", "square", "triangle", "cross")
CELLS = tuple(f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right"))
EVALUATION_SHARE = 0.2


@dataclass(frozen=True, order=True)
class Object:
    """One shape: its cell (0 to 8, row by row), its shape and its colour."""

    cell: int
    shape: str
    colour: str


@dataclass(frozen=True)
class Scene:
    """Objects in order of their cells."""

    objects: tuple[Object, ...]

    def __post_init__(self):
        cells = [item.cell for item in self.objects]
        if cells != sorted(set(cells)):
            raise ValueError(f"a scene lists its objects by cell, one a cell; got cells {cells}")

    @property
    def id(self) -> str:
        """The content as a string; equal scenes have equal ids."""
        return "|".join(f"{item.cell}:{item.shape}:{item.colour}" for item in self.objects)

    @property
    def split(self) -> str:
        """ "train" or "eval", by a hash of the content: no scene is ever in both."""
        return "eval" if _hash(self.id) % 1000 < EVALUATION_SHARE * 1000 else "train"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def draw_scene(rng: random.Random, size: int, split: str, looks: list[tuple[str, str]] | None = None) -> Scene:
    """A random scene of `size` objects from one split; `looks` fixes the (shape, colour) of each object instead."""
    while True:
        chosen = looks or [(rng.choice(SHAPES), rng.choice(list(COLOURS))) for _ in range(size)]
        cells = rng.sample(range(GRID * GRID), size)
        scene = Scene(tuple(sorted(Object(cell, *look) for cell, look in zip(cells, chosen, strict=True))))
        if scene.split == split:
            return scene


def render(scene: Scene) -> Image.Image:
    """The scene as an 84×84 RGB picture. Size, place in the cell and shade vary, always the same way for one scene."""
    rng = random.Random(_hash(scene.id))
    shade = rng.randint(225, 250)
    image = Image.new("RGB", (IMAGE_PX * OVERSAMPLING,) * 2, (shade, shade, shade))
    canvas = ImageDraw.Draw(image)
    for item in scene.objects:
        row, column = divmod(item.cell, GRID)
        x, y = ((axis + 0.5) * CELL_PX + rng.uniform(-2, 2) for axis in (column, row))
        colour = tuple(min(255, max(0, value + rng.randint(-12, 12))) for value in COLOURS[item.colour])
        _draw_shape(canvas, item.shape, x * OVERSAMPLING, y * OVERSAMPLING, rng.uniform(9, 11.5) * OVERSAMPLING, colour)
    return image.resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BOX)


def _draw_shape(canvas: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, colour: tuple) -> None:
    if shape == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif shape == "square":
        half = radius * 0.85
        canvas.rectangle((x - half, y - half, x + half, y + half), fill=colour)
    elif shape == "triangle":
        corners = [(x + radius * math.sin(a), y - radius * math.cos(a)) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
        canvas.polygon(corners, fill=colour)
    elif shape == "cross":
        arm = radius * 0.32
        canvas.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
        canvas.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
