"""Prints of images: small grey pictures by which an image is known again after a harness encoded it anew."""

from __future__ import annotations

import base64
import io

SIDE = 16


def image_print(url: str) -> str | None:
    """Base64 of 16 x 16 grey bytes of a data URL; None for an image that lies elsewhere."""
    head, comma, data = url.partition(",")
    if not (head.startswith("data:") and comma):
        return None
    return bytes_print(base64.b64decode(data))


def bytes_print(image: bytes) -> str:
    """The same of the bytes of an image file."""
    from PIL import Image

    with Image.open(io.BytesIO(image)) as picture:
        small = picture.convert("RGB").convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    return base64.b64encode(small.tobytes()).decode()


def distance(one: list[str | None], other: list[str | None]) -> float:
    """Mean absolute difference of two lists of prints, 0 to 255; infinity where there are not as many images."""
    import numpy as np

    if len(one) != len(other):
        return float("inf")
    known = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    if not known:
        return 0.0
    differences = []
    for a, b in known:
        first, second = (np.frombuffer(base64.b64decode(text), np.uint8).astype(int) for text in (a, b))
        differences.append(np.abs(first - second).mean())
    return float(np.mean(differences))
