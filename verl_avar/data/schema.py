"""The schema that every source of image questions is brought to, and that synthesis, training data and checks read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import pyarrow as pa

IMAGE = "<image>"  # verl's and LLaMA-Factory's placeholder
# System turn of rows that have none: visual attention is set against the system turn's (AVAR §2.2).
SYSTEM = (
    "Look at the image closely and reason before you answer, going back to the image to check what you see. Write your "
    "reasoning between <think> and </think>, then the final answer alone between <answer> and </answer>."
)
MAX_PIXELS = 1003520  # 1280 tokens of 28 × 28 pixels

IMAGES = pa.list_(pa.struct([("bytes", pa.binary())]))
ROWS = pa.schema(
    [
        # Hash of the content (`content_id`): the same question about the same images has the same id anywhere.
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),  # name of the data set, as its reader gives it
        pa.field("source_row", pa.int64(), nullable=False),  # position in the source, from 0; with it the row's key
        # What a model is asked: with an IMAGE placeholder for each image, in order, and options as lines "A. …".
        pa.field("question", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),  # text, choice letter, number with its unit, or LaTeX
        pa.field("choices", pa.list_(pa.string()), nullable=False),  # texts of A, B, …; empty for open questions
        pa.field("images", IMAGES, nullable=False),  # PNG, JPEG or WebP files, at least one
        pa.field("meta", pa.string(), nullable=False),  # JSON object of what else the source says
    ]
)


def content_id(question: str, answer: str, choices: Sequence[str], images: Iterable[bytes]) -> str:
    """32 hexadecimal digits of SHA-256 over all that a model is asked and judged by."""
    digest = hashlib.sha256()
    for part in (question, answer, *choices):
        digest.update(part.encode() + b"\0")
    for image in images:
        digest.update(hashlib.sha256(image).digest())
    return digest.hexdigest()[:32]
