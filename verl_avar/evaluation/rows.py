"""Image questions from a file or a folder, as rows that every measurement takes.

A row needs a question and its images; a response and a right answer may come with it. Recognised:

    a folder of images       with one question for all (`question=`)
    .parquet, .jsonl         one row a question:
        prompt | messages    chat messages, `<image>` in the text or content parts (verl's formats)
        question             or a plain question; `<image>` optional, images go before the text
        image | images       path (relative to the file), bytes, {"bytes": …} or {"path": …}, or a list of these;
                             or in the content parts: {"type": "image", "image": …}
        response             what the model said, if already known; or a last message of the assistant
        answer               the right answer, a text or a number; or `ground_truth`, or verl's
                             `reward_model.ground_truth`
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

QUESTIONS = ("question", "problem", "query")
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
    ended: bool = True  # the response, by the model's end marker and not by a limit

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
            rows.append(Row(_name(record, number), problem=str(error)))
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
        with source.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    yield json.loads(line.decode("utf-8-sig"))
                except ValueError as error:  # no UTF-8, or no JSON
                    yield ValueError(f"line {number} is no JSON in UTF-8: {error}")
    else:
        raise ValueError(f"{source}: expected .parquet, .jsonl or a folder of images")


def _row(record: Any, number: int, source: Path, question: str | None, system: str | None) -> Row:
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with columns, got {type(record).__name__}")
    if _given(record.get("videos")):
        raise ValueError("videos are not read; only images are")
    images, response = _images(record), _text(record, "response")
    messages = record.get("messages") if _given(record.get("messages")) else record.get("prompt")
    if isinstance(messages, str):
        messages, question = None, messages
    if _given(messages):
        if not isinstance(messages, list):
            raise ValueError(f"messages must be a list, got {type(messages).__name__}")
        if not images:
            images = _inline_images(messages)
        messages = [_message(m) for m in messages]
        if messages[-1]["role"] == "assistant":
            last = _answered(messages.pop()["content"])
            response = last if response is None else response
        messages = conversation(messages)
    else:
        text = next((text for name in QUESTIONS if (text := _text(record, name))), question)
        if not text or not text.strip():
            raise ValueError("no question: expected a column prompt, messages or question")
        if IMAGE_PLACEHOLDER not in text:
            text = IMAGE_PLACEHOLDER * len(images) + text
        messages = conversation([{"role": "user", "content": text}])
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("the conversation must end with a user's turn, or with the assistant's answer to one")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    wanted = sum(part["type"] == "image" for message in messages for part in message["content"])
    if wanted != len(images):
        raise ValueError(f"{wanted} image places in the conversation, {len(images)} images")
    images = [_image(image, source) for image in images]
    return Row(_name(record, number), messages, images, response, _answer(record))


def _name(record: Any, number: int) -> str:
    """What the row is called: its id, verl's index, or else its number."""
    record = record if isinstance(record, dict) else {}
    extra = record.get("extra_info")
    names = (record.get("id"), extra.get("index") if isinstance(extra, dict) else None)
    return str(next((name for name in names if name is not None), number))


def _answer(record: dict) -> str | None:
    """The right answer, where it is a text or a number; a list or a dict can't be compared with a response."""
    reward = record.get("reward_model")
    places = (record, record, reward if isinstance(reward, dict) else {})
    found = (place.get(name) for place, name in zip(places, ("answer", *2 * ("ground_truth",)), strict=True))
    answer = next((value for value in found if value is not None), None)
    return str(answer) if isinstance(answer, str | int | float) else None


def _text(record: dict, name: str) -> str | None:
    value = record.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"column {name}: expected text, got {type(value).__name__}")
    return value


def _message(message: Any) -> dict:
    if not isinstance(message, dict) or message.get("role") is None or message.get("content") is None:
        raise ValueError("a message needs a role and a content")
    content = message["content"]
    if not isinstance(content, str):
        if not isinstance(content, list):
            raise ValueError(f"content must be a text or a list of parts, got {type(content).__name__}")
        content = [_part(part) for part in content]
    return {"role": message["role"], "content": content}


def _answered(content: str | list[dict]) -> str:
    """The text of an assistant's message; "<image>" in it is a text, not a place for an image."""
    if isinstance(content, str):
        return content
    if any(part["type"] == "image" for part in content):
        raise ValueError("an image in the assistant's answer")
    return "".join(part["text"] for part in content)


def _part(part: Any) -> dict:
    if not isinstance(part, dict):
        raise ValueError(f"a content part must be an object with a type, got {type(part).__name__}")
    kind, text = part.get("type"), part.get("text")
    if kind not in ("text", "image"):
        raise ValueError(f"a content part of type {kind}; known: text, image")
    if kind == "image":
        return {"type": "image"}
    if not isinstance(text, str):
        raise ValueError("a content part of type text without a text")
    return {"type": "text", "text": text}


def _inline_images(messages: list) -> list:
    """Images that stand in the content parts themselves."""
    parts = (
        part
        for message in messages
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        for part in message["content"]
    )
    return [p["image"] for p in parts if isinstance(p, dict) and p.get("type") == "image" and p.get("image")]


def _images(record: dict) -> list:
    images = record.get("images")
    if not _given(images):
        images = record.get("image")
    if not _given(images):
        return []
    return list(images) if isinstance(images, list | tuple | np.ndarray) else [images]


def _image(image: Any, source: Path) -> Any:
    """A path is relative to the folder of the data file."""
    if isinstance(image, dict):
        content, image = image.get("bytes"), image.get("path")
        if content:
            if not isinstance(content, bytes):
                raise ValueError(f"an image's bytes must be bytes, got {type(content).__name__}; give a path instead")
            return content
    if isinstance(image, str):
        return {"path": str(source.parent / image if source.is_file() else image)}
    if isinstance(image, bytes):
        return image
    raise ValueError(f"an image must be a path or bytes, got {type(image).__name__}")


def _given(value: Any) -> bool:
    return value is not None and not (hasattr(value, "__len__") and len(value) == 0)
