"""Images of a row as the model should see them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError


def open_images(images: Sequence[Any]) -> list[Image.Image]:
    """RGB images of a row: {"bytes": …} or {"path": …} as verl and datasets store them, bytes, paths, or PIL images.

    Upright by their EXIF orientation; what is transparent shows white, as on a page.
    Raises OSError for what is no image or is cut off, ValueError for an image beyond PIL's limit of pixels or of values
    that have no known white.
    """
    return [_rgb(_load(image)) for image in images]


def _load(image: Any) -> Image.Image:
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") else image["path"]
    if isinstance(image, Image.Image):
        return image
    source = io.BytesIO(image) if isinstance(image, bytes) else image
    try:
        return Image.open(source)
    except UnidentifiedImageError:
        where = f"{len(image)} bytes" if isinstance(image, bytes) else image
        raise OSError(f"cannot identify image: {where} in no format that Pillow reads") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"image too large: {error}") from None


def _rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("F", "I"):
        kind = {"F": "fractions", "I": "32-bit whole numbers"}[image.mode]
        raise ValueError(f"an image of {kind}, which no known value shows white in: save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):  # PIL would cut the high values off instead of scaling them
        image = image.point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
