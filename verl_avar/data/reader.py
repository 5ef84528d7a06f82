"""What a reader of one data set is, and what it makes of a record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


class Unfit(ValueError):
    """A record that is no row, and why."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Broken:
    """A record of a source that is no row of the schema."""

    source: str
    source_row: int
    reason: str  # no_image, bad_image, no_question, no_answer or bad_row
    detail: str  # one line for a person


@dataclass
class Parts:
    """A record by the schema's parts, images not opened yet."""

    question: Any
    answer: Any
    images: Any  # one or a list: bytes, {bytes, path}, a path, or base64
    choices: Any = None  # as `choices_of` takes them
    meta: dict[str, Any] = field(default_factory=dict)  # beside the source's other columns


@dataclass(frozen=True)
class Reader:
    """How records of one data set become rows."""

    name: str
    hub: str | None
    # Our part -> the names that its column may have, exactly one of which must be there. Parts that end in "?" may be
    # missing.
    columns: Mapping[str, tuple[str, ...]]
    rows: str  # as its publisher counts them, by split
    convert: Callable[[Mapping[str, Any], str], Parts]  # (values of the parts' columns, "SOURCE, row N") -> Parts
    split: str = "train"  # what the publisher calls the only split; `train` stands for it
