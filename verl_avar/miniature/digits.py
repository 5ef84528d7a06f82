"""Real handwritten digits as pictures of the miniature's size.

Source: scikit-learn's `load_digits` (1,797 digits of 8×8 pixels from the UCI "Optical Recognition of Handwritten
Digits" test set). The set is in the order of its writers, each of whom wrote about 130 digits and begins with
0 1 2 … 9 three times over; evaluation uses the last three writers only, who were never trained on.
"""

import random
from functools import cache

import numpy as np
from PIL import Image

from verl_avar.miniature.scenes import IMAGE_PX

EVALUATION_FROM = 1415  # index of the first digit of the third writer from the end


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images, data.target


def label(index: int) -> int:
    """Which digit (0 to 9) the sample shows."""
    return int(_digits()[1][index])


def split_of(index: int) -> str:
    """ "train" or "eval", by writer."""
    return "eval" if index >= EVALUATION_FROM else "train"


@cache
def _members(split: str, digit: int) -> list[int]:
    """Indices of the samples of one split that show one digit."""
    labels = _digits()[1]
    return [index for index in range(len(labels)) if labels[index] == digit and split_of(index) == split]


def draw_digit(rng: random.Random, split: str) -> int:
    """Index of a random sample of one split, every digit equally likely."""
    return rng.choice(_members(split, rng.randrange(10)))


def render(index: int, rng: random.Random | None = None) -> Image.Image:
    """The sample as an 84×84 RGB picture, dark ink on light ground; with `rng` shifted, turned and scaled a little."""
    ink = Image.fromarray(np.uint8(_digits()[0][index] * (255 / 16)))
    ink = ink.resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BICUBIC)
    if rng is not None:
        scale = rng.uniform(0.9, 1.15)
        shift = (1 - scale) * IMAGE_PX / 2
        x, y = (shift + rng.uniform(-5, 5) for _ in range(2))
        ink = ink.transform(ink.size, Image.Transform.AFFINE, (scale, 0, x, 0, scale, y), Image.Resampling.BILINEAR)
        ink = ink.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR)
    ground = Image.new("RGB", ink.size, (238, 238, 238))
    ground.paste((40, 40, 40), mask=ink)
    return ground
