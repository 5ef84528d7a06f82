"""Whether a parquet file holds what its readers expect: rows of the schema, or verl's SFT or RL rows."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from verl_avar.data.choices import with_options
from verl_avar.data.images import KEPT, UNREADABLE
from verl_avar.data.schema import IMAGE, ROWS, content_id
from verl_avar.errors import ConfigError

BATCH = 64
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Fault:
    """What is wrong in one row."""

    column: str
    what: str
    fix: str


@dataclass(frozen=True)
class Kind:
    """A layout that is recognised by the first of its columns. Only the first of a row's `faults` is asked for: what
    follows it may take for granted that it is not there.
    """

    name: str
    columns: tuple[str, ...]
    faults: Callable[[dict], Iterator[Fault]]


def faults(path: Path) -> Iterator[tuple[int, Fault | None]]:
    """(row, its first fault or None) for each row of a file. Raises ConfigError for a file that can't be read, is of no
    known layout, or lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            kind = kind_of(file.schema_arrow.names, path)
            keys: dict[tuple, int] = {}
            rows = (row for batch in file.iter_batches(batch_size=BATCH) for row in batch.to_pylist())
            for number, row in enumerate(rows):
                yield number, next(kind.faults(row), None) or _repeated(kind, row, number, keys)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: not a whole parquet file: {' '.join(str(error).split())}") from error


def kind_of(columns: Sequence[str], path: Path | str) -> Kind:
    """The layout with these columns. Raises ConfigError for none, and for one that is not complete."""
    kind = next((kind for kind in KINDS if kind.columns[0] in columns), None)
    seen = f"the columns are {', '.join(columns)}"
    if kind is None:
        known = "; ".join(f"{kind.name}: {', '.join(kind.columns)}" for kind in KINDS)
        raise ConfigError(f"{path}: no layout that is known ({known}); {seen}")
    if missing := [name for name in kind.columns if name not in columns]:
        raise ConfigError(f"{path}: {kind.name} must have a column {', '.join(missing)}; {seen}")
    return kind


def _repeated(kind: Kind, row: dict, number: int, keys: dict[tuple, int]) -> Fault | None:
    if kind is not KINDS[-1]:
        return None
    first = keys.setdefault((row["source"], row["source_row"]), number)
    if first == number:
        return None
    return Fault("source_row", f"the same source and source_row as row {first}", "number the rows of each source")


def _schema_row(row: dict) -> Iterator[Fault]:
    for name in ROWS.names:
        if row[name] is None:
            yield Fault(name, "null", f"the schema wants {ROWS.field(name).type}")
    for name in ("source", "question", "answer"):
        if not isinstance(row[name], str) or not row[name].strip():
            yield Fault(name, f"{row[name]!r} is no text", "give it, or leave the row out")
    yield from _images(row["images"])
    yield from _places(row["question"], len(row["images"]), "question")
    choices = row["choices"]
    if len(choices) > 26 or not all(isinstance(text, str) and text.strip() for text in choices):
        yield Fault("choices", "empty texts, or more than 26", "one text for each of A, B, …")
    if choices and with_options(row["question"], choices) != row["question"]:
        yield Fault("question", "the choices don't stand in it", "end it with a line 'A. …' for each choice")
    if choices and re.fullmatch(r"[A-Z]", row["answer"]) and row["answer"] not in ascii_uppercase[: len(choices)]:
        yield Fault("answer", f"{row['answer']} of {len(choices)} choices", "name one of the choices")
    try:
        said = json.loads(row["meta"])
    except (TypeError, ValueError):
        said = None
    if not isinstance(said, dict):
        yield Fault("meta", f"{str(row['meta'])[:40]!r} is no JSON object", "write {} where there is nothing to say")
    images = [image["bytes"] for image in row["images"]]
    if row["id"] != content_id(row["question"], row["answer"], choices, images):
        yield Fault("id", "not the hash of the row's content", "set it with verl_avar.data.schema.content_id")


def _sft_row(row: dict) -> Iterator[Fault]:
    from verl_avar.evaluation.scoring import is_well_formed

    yield from _images(row["images"])
    yield from _turns(row["messages"], "messages", ("user", "assistant"))
    text = "".join(message["content"] for message in row["messages"])
    yield from _places(text, len(row["images"]), "messages")
    for message in row["messages"]:
        if message["role"] == "assistant" and not is_well_formed(message["content"]):
            yield Fault(
                "messages",
                f"the reply {message['content'][:40]!r} is not <think>…</think><answer>…</answer>",
                "each tag once, with text in it, and nothing around",
            )


def _rl_row(row: dict) -> Iterator[Fault]:
    yield from _images(row["images"])
    yield from _turns(row["prompt"], "prompt", ("user",))
    yield from _places("".join(message["content"] for message in row["prompt"]), len(row["images"]), "prompt")
    truth = (row["reward_model"] or {}).get("ground_truth")
    if not isinstance(truth, str) or not truth.strip():
        yield Fault("reward_model", f"ground_truth is {truth!r}", "the right answer as text, or leave the row out")
    if not row["data_source"]:
        yield Fault("data_source", f"{row['data_source']!r} is no name", "the name of the data set")


def _turns(messages: Any, column: str, repeated: tuple[str, ...]) -> Iterator[Fault]:
    """A system turn, then `repeated`, as often as it takes."""
    if not messages or not all(isinstance(message.get("content"), str) for message in messages):
        yield Fault(column, "no messages, or one without a text", "a list of {role, content}")
        return
    roles = [message["role"] for message in messages]
    if roles[:1] != ["system"]:
        yield Fault(column, f"the roles are {roles}", "begin with a system turn: attention is set against it")
    if roles[1:] != list(repeated) * (len(roles[1:]) // len(repeated)) or not roles[1:]:
        yield Fault(column, f"the roles are {roles}", f"after the system turn {' and '.join(repeated)}, in turn")


def _images(images: Any) -> Iterator[Fault]:
    from PIL import Image

    if not images:
        yield Fault("images", "none", "give one, or leave the row out")
        return
    for number, image in enumerate(images):
        data = image.get("bytes") if isinstance(image, dict) else None
        if not data:
            yield Fault("images", f"image {number} has no bytes", "put the file's content into {bytes}")
            continue
        try:
            with Image.open(io.BytesIO(data)) as picture:
                picture.load()
                if picture.format not in KEPT:
                    yield Fault("images", f"image {number} is {picture.format}", f"one of {', '.join(KEPT)}")
        except UNREADABLE as error:
            yield Fault("images", f"image {number} can't be read: {error}", "replace it, or leave the row out")


def _places(text: str, images: int, column: str) -> Iterator[Fault]:
    if (there := text.count(IMAGE)) != images:
        yield Fault(column, f"{there} {IMAGE} for {images} images", f"one {IMAGE} for each image, in order")


KINDS = (
    Kind("verl's SFT rows", ("messages", "images"), _sft_row),
    Kind("verl's RL rows", ("prompt", "images", "reward_model", "data_source"), _rl_row),
    Kind("schema ROWS", ("question", *(name for name in ROWS.names if name != "question")), _schema_row),
)
