"""Image questions from a file or a folder, as rows that every measurement takes.

A row needs a question and its images; a response and a right answer may come with it. Recognised:

    a folder of images       with one question for all (`question=`)
    .parquet, .jsonl         one row a question:
        prompt | messages    chat messages, `<image>` in the text or content parts (verl's formats)
        question             or a plain question; `<image>` optional, images go before the text
        image | images       path (relative to the file), bytes, {"bytes": …} or {"path": …}, or a list of these
        response             what the model said, if already known; or a last message of the assistant
        answer               the right answer; or `ground_truth`, or verl's `reward_model.ground_truth`
        id                   a name for the row; its number by default
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from verl_avar.evaluation.checkpoint import IMAGE_PLACEHOLDER, conversation

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass
class Row:
    """One image question. `problem` says why the row can't be used, where it can't."""

    id: str
    messages: list[dict] = field(default_factory=list)  # content as parts, up to the last user turn
    images: list[Any] = field(default_factory=list)  # not opened yet
    response: str | None = None
    answer: str | None = None
    problem: str | None = None

    @property
    def question(self) -> str:
        """Text of the last user turn."""
        users = [m for m in self.messages if m["role"] == "user"]
        return "".join(p.get("text", "") for p in users[-1]["content"]).strip() if users else ""


def read_rows(
    source: str | Path, question: str | None = None, system: str | None = None, limit: int | None = None
) -> list[Row]:
    """Rows of a file or a folder of images; at most `limit`.

    question: for images that have none of their own. system: a system message for rows that have none.
    A row that can't be used comes back with its `problem`. Raises OSError where there is nothing to read, ValueError
    where the source as a whole can't be understood.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    rows = []
    for number, record in enumerate(_records(source, question)):
        if limit is not None and number >= limit:
            break
        try:
            if isinstance(record, ValueError):
                raise record
            rows.append(_row(record, number, source, question, system))
        except ValueError as error:
            name = record.get("id", number) if isinstance(record, dict) else number
            rows.append(Row(str(name), problem=str(error)))
    if not rows:
        raise ValueError(f"{source}: no rows")
    return rows


def _records(source: Path, question: str | None) -> Iterator[dict | ValueError]:
    if source.is_dir():
        if not question:
            raise ValueError(f"{source}: a folder of images needs --question")
        pictures = sorted(p for p in source.iterdir() if p.suffix.lower() in PICTURES)
        if not pictures:
            raise ValueError(f"{source}: no images ({', '.join(PICTURES)})")
        yield from ({"id": p.name, "image": {"path": str(p)}} for p in pictures)
    elif source.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            file = pq.ParquetFile(source)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{source}: not a parquet file: {error}") from None
        for batch in file.iter_batches(batch_size=64):
            yield from batch.to_pylist()
    elif source.suffix == ".jsonl":
        with source.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    yield ValueError(f"line {number} is no JSON: {error}")
    else:
        raise ValueError(f"{source}: expected .parquet, .jsonl or a folder of images")


def _row(record: Any, number: int, source: Path, question: str | None, system: str | None) -> Row:
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with columns, got {type(record).__name__}")
    if _given(record.get("videos")):
        raise ValueError("videos are not read; only images are")
    images = [_image(image, source) for image in _images(record)]
    messages = record.get("messages") if _given(record.get("messages")) else record.get("prompt")
    if isinstance(messages, str):
        messages, question = None, messages
    if _given(messages):
        messages = conversation([_message(m) for m in messages])
    else:
        text = record.get("question") or record.get("problem") or record.get("query") or question
        if not text:
            raise ValueError("no question: expected a column prompt, messages or question")
        if IMAGE_PLACEHOLDER not in text:
            text = IMAGE_PLACEHOLDER * len(images) + text
        messages = conversation([{"role": "user", "content": text}])
    response = record.get("response")
    if messages[-1]["role"] == "assistant":
        last = "".join(part.get("text", "") for part in messages.pop()["content"])
        response = last if response is None else response
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("the conversation must end with a user's turn, or with the assistant's answer to one")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    wanted = sum(part["type"] == "image" for message in messages for part in message["content"])
    if wanted != len(images):
        raise ValueError(f"{wanted} image places in the conversation, {len(images)} images")
    answer = record.get("answer", record.get("ground_truth"))
    if answer is None:
        answer = (record.get("reward_model") or {}).get("ground_truth")
    extra = record.get("extra_info") or {}
    name = record.get("id", extra.get("index", number))
    answer = None if answer is None else str(answer)
    return Row(str(name), messages, images, None if response is None else str(response), answer)


def _message(message: Any) -> dict:
    if not isinstance(message, dict) or message.get("role") is None or message.get("content") is None:
        raise ValueError("a message needs a role and a content")
    content = message["content"]
    if not isinstance(content, str):
        content = [{k: v for k, v in part.items() if v is not None} for part in content]  # parquet fills in nulls
        kinds = {part.get("type") for part in content}
        if unknown := kinds - {"text", "image"}:
            raise ValueError(f"a content part of type {sorted(map(str, unknown))[0]}; known: text, image")
        content = [{"type": p["type"]} | ({"text": p["text"]} if p["type"] == "text" else {}) for p in content]
    return {"role": message["role"], "content": content}


def _images(record: dict) -> list:
    images = record.get("images")
    if not _given(images):
        images = record.get("image")
    if not _given(images):
        return []
    return list(images) if isinstance(images, list | tuple | np.ndarray) else [images]


def _image(image: Any, source: Path) -> Any:
    """A path is relative to the folder of the data file."""
    path = image.get("path") if isinstance(image, dict) and not image.get("bytes") else image
    if isinstance(path, str):
        return {"path": str(source.parent / path if source.is_file() else path)}
    if isinstance(image, bytes | dict):
        return image
    raise ValueError(f"an image must be a path or bytes, got {type(image).__name__}")


def _given(value: Any) -> bool:
    return value is not None and not (hasattr(value, "__len__") and len(value) == 0)
