"""Image files of rows: reading them in any of the ways that data sets store them, and bringing them to one form."""

from __future__ import annotations

import ast
import base64
import binascii
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from verl_avar.errors import ConfigError

KEPT = ("PNG", "JPEG", "WEBP")  # formats that models' servers and trainers read; others become PNG
UNREADABLE = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)
ADDRESSES = ("http://", "https://")
LONGEST_PATH = 255  # a longer text in an image's place is base64, as is one that begins as image files do
BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")  # PNG, JPEG, GIF, WebP


def flat(picture: Image.Image) -> Image.Image:
    """The picture as RGB, transparent parts white as on paper: without that a black drawing on nothing is all black."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    drawing = picture.convert("RGBA")
    paper = Image.new("RGBA", drawing.size, (255, 255, 255, 255))
    return Image.alpha_composite(paper, drawing).convert("RGB")


def encoded(image: Any, folder: Path | None, max_pixels: int, where: str) -> dict[str, bytes]:
    """{bytes} of an image {bytes, path} or path: as it is stored where that is PNG, JPEG or WebP of at most
    `max_pixels`, else as PNG, scaled down to that.

    Every image is decoded once, so that a file that was cut off is found here and not in training. Raises ConfigError
    for an image that is not there or can't be read.
    """
    data, path = (image.get("bytes"), image.get("path")) if isinstance(image, Mapping) else (None, image)
    if data is None:
        file = Path(str(path)).expanduser()
        file = file if file.is_absolute() or folder is None else folder / file
        if not file.is_file():
            raise ConfigError(f"{where}: no image file {file}")
        data = file.read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as picture:
            width, height = picture.size
            if width * height <= max_pixels:
                picture.load()
                if picture.format in KEPT:
                    return {"bytes": data}
                smaller = flat(picture)
            else:
                scale = math.sqrt(max_pixels / (width * height))
                size = max(1, int(width * scale)), max(1, int(height * scale))
                smaller = flat(picture).resize(size, Image.Resampling.BICUBIC)
    except UNREADABLE as error:
        raise ConfigError(f"{where}: an image can't be read: {error}") from error
    buffer = io.BytesIO()
    smaller.save(buffer, format="PNG")
    return {"bytes": buffer.getvalue()}


def images_of(value: Any) -> list:
    """The images of a cell that holds none, one, or a list of them."""
    values = value if isinstance(value, list) else [value]
    return [image for image in values if image not in (None, "")]


def stored_images(value: Any) -> list:
    """`images_of` a cell that may also be text: base64, a data URI, or a list of these or of paths written in Python,
    as VLMEvalKit's TSV files have them. Raises ConfigError for an address on the network and for broken base64.
    """
    if isinstance(value, str) and value.startswith("["):
        try:
            value = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            raise ConfigError(f"the images begin with '[' but are no list: {value[:40]}") from None
    return [_decoded(image) if isinstance(image, str) else _given(image) for image in images_of(value)]


def _given(image: Any) -> Any:
    if isinstance(image, bytes):
        return {"bytes": image}
    if isinstance(image, Mapping) and (image.get("bytes") or image.get("path")):
        return image
    raise ConfigError(f"an image must be bytes, a path or {{bytes, path}}, it is {str(image)[:40]}")


def _decoded(text: str) -> str | dict[str, bytes]:
    if text.startswith(ADDRESSES):
        raise ConfigError(f"an image is an address, {text[:60]}; download it and give its path")
    if text.startswith("data:image/"):
        text = text.partition(",")[2]
    elif len(text) <= LONGEST_PATH and not text.startswith(BASE64):
        return text
    try:
        return {"bytes": base64.b64decode(text, validate=True)}
    except (binascii.Error, ValueError):
        raise ConfigError(f"an image is neither a path nor base64: {text[:40]}…") from None


def located(image: Any, folders: Sequence[Path]) -> Any:
    """A relative path as the file that is there in the first of `folders` that has it; anything else as it is."""
    path = image.get("path") if isinstance(image, Mapping) and image.get("bytes") is None else image
    if not isinstance(path, str) or Path(path).expanduser().is_absolute():
        return image
    return next((str(folder / path) for folder in folders if (folder / path).is_file()), image)


def data_uri(image: bytes) -> str:
    """The file with its type, by its first bytes. Raises ConfigError for other types than PNG, JPEG and WebP."""
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        kind = "png"
    elif image.startswith(b"\xff\xd8\xff"):
        kind = "jpeg"
    elif image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        kind = "webp"
    else:
        raise ConfigError(f"an image is neither PNG, JPEG nor WebP; it begins with {image[:12]!r}")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
