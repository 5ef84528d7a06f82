"""What two questions about images are compared by: texts without dress, and hashes of how the images look."""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image

from verl_avar.data.choices import LABELLED
from verl_avar.data.images import flat

PLACEHOLDER = re.compile(r"<\s*image(?:here)?[\s_]*\d*\s*>", re.IGNORECASE)
OPTIONS = re.compile(r"^\s*(?:options|choices)\s*:", re.IGNORECASE | re.MULTILINE)
LABEL = re.compile(r"\d+(?:[.,]\d+)*|\b[A-Z]{1,4}\b")  # what distinguishes one exercise from the next: 3.5, AB
GRID = 8  # the thumbnail is GRID × GRID
# Most that one colour of one cell of the thumbnails may differ, of 255. Measured on the miniature's scenes: copies as
# JPEG of quality 70 differ by at most 13, copies at 70 % of the size by 7, other scenes with close hashes by 80 and up.
THUMBNAIL_DIFFERENCE = 24


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """One row, as far as it is compared with others."""

    id: str
    source: str
    source_row: int
    question: str  # normal
    stem: str  # normal, without options
    answer: str  # normal
    labels: tuple[str, ...]  # numbers and capitals of the question, sorted
    choices: tuple[str, ...]  # normal
    hashes: tuple[int, ...]  # perceptual hash of each image, 64 bits
    thumbnails: tuple[bytes, ...]  # GRID × GRID × 3 colours of each image


def normal(text: str) -> str:
    """Text without placeholders, case, and differences of white space and of Unicode's forms."""
    return " ".join(unicodedata.normalize("NFKC", PLACEHOLDER.sub(" ", text)).casefold().split())


def stem(text: str) -> str:
    """The question without the options that follow it, as `normal` text; all of it where nothing comes before them."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        found = LABELLED.match(line)
        if found and found[1] == "A" and any(m[1] == "B" for m in map(LABELLED.match, lines[number + 1 :]) if m):
            lines = lines[:number]
            break
    before = OPTIONS.split("\n".join(lines))[0]
    return normal(before) or normal(text)


def look_of(image: bytes) -> tuple[int, bytes]:
    """(perceptual hash, thumbnail) of an image file. Raises what PIL raises for a broken one.

    The hash is ImageHash's pHash: signs of the 8 × 8 lowest frequencies of the grey picture. It does not see colours,
    nor small things; the thumbnail, mean colours of 8 × 8 cells, sees both better.
    """
    import imagehash
    import numpy as np

    with Image.open(io.BytesIO(image)) as picture:
        shown = flat(picture)
    bits = imagehash.phash(shown).hash.reshape(-1)
    thumbnail = shown.resize((GRID, GRID), Image.Resampling.BOX)
    return int.from_bytes(np.packbits(bits).tobytes(), "big"), thumbnail.tobytes()


def looks_of(images: Iterable[bytes]) -> tuple[tuple[int, ...], tuple[bytes, ...]]:
    """(hashes, thumbnails) of image files."""
    looks = [look_of(image) for image in images]
    return tuple(hashed for hashed, _ in looks), tuple(thumbnail for _, thumbnail in looks)


def fingerprint(row: dict) -> Fingerprint:
    """Of a row of schema.ROWS."""
    hashes, thumbnails = looks_of(image["bytes"] for image in row["images"])
    return Fingerprint(
        row["id"],
        row["source"],
        row["source_row"],
        normal(row["question"]),
        stem(row["question"]),
        normal(row["answer"]).strip("$ ."),
        tuple(sorted(LABEL.findall(PLACEHOLDER.sub(" ", row["question"])))),
        tuple(normal(text) for text in row["choices"]),
        hashes,
        thumbnails,
    )


def alike(one: tuple[int, bytes], other: tuple[int, bytes], distance: int) -> bool:
    """Whether two images look the same: hashes that differ in at most `distance` bits, and close thumbnails."""
    return (one[0] ^ other[0]).bit_count() <= distance and _close(one[1], other[1])


def _close(one: bytes, other: bytes) -> bool:
    return one == other or all(abs(a - b) <= THUMBNAIL_DIFFERENCE for a, b in zip(one, other, strict=True))


def plain(thumbnail: bytes) -> bool:
    """Whether an image is of one colour all over, so that being like it says nothing."""
    pixels = {thumbnail[at : at + 3] for at in range(0, len(thumbnail), 3)}
    return len(pixels) == 1


def same_wording(one: str, other: str, similarity: float) -> bool:
    """Whether two normal texts say the same: RapidFuzz's ratio of at least `similarity`, and no word in the place of
    another ("circles" for "squares"), misspellings aside.
    """
    from rapidfuzz import fuzz

    if one == other:
        return True
    if fuzz.ratio(one, other, score_cutoff=similarity) == 0:
        return False
    ours, theirs = _words_only_in(one, other), _words_only_in(other, one)
    fewer, more = sorted((ours, theirs), key=len)
    return all(any(fuzz.ratio(word, each) > 80 for each in more) for word in fewer)


def _words_only_in(one: str, other: str) -> Sequence[str]:
    there = set(re.findall(r"\w+", other))
    return [word for word in re.findall(r"\w+", one) if word not in there]
