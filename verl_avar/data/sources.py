"""Rows of the schema from published data sets and from anyone's tables, one at a time."""

from __future__ import annotations

import itertools
import json
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from verl_avar.data.choices import choices_of, with_options
from verl_avar.data.images import encoded, located, stored_images
from verl_avar.data.published import placed
from verl_avar.data.reader import Broken, Parts, Reader, Unfit
from verl_avar.data.readers import READERS
from verl_avar.data.records import Records, open_records
from verl_avar.data.schema import MAX_PIXELS, ROWS, content_id
from verl_avar.errors import ConfigError

PARTS = ("question", "answer", "choices", "images")  # what `columns` of the generic reader may name


def read_source(
    path: str,
    reader: str = "generic",
    split: str = "train",
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
) -> Iterator[dict | Broken]:
    """Rows of schema.ROWS from a file, a folder or a hub name; a `Broken` for each record that is none.

    path: as `records.open_records` takes it. limit: records taken, from the start. columns: for the generic reader,
    our parts (question, answer, choices, images) to the source's columns. max_pixels: larger images are scaled down.
    name: what to call the source, by default `source_name`. source_row counts the source's records from 0, broken ones
    included.

    The question ends with its choices, one "A. …" a line, unless they stand in it already, and has one <image> for each
    image. Raises ConfigError, at the first row, for a source that can't be read or has other columns.
    """
    how = find_reader(reader)
    records = open_records(path, how.split if split == "train" else split, limit)
    chosen = _columns(how, records, dict(columns or {}), path)
    source = name or source_name(path, reader, split)
    for number, record in enumerate(itertools.islice(records.rows, limit)):
        try:
            if isinstance(record, ValueError):
                raise record
            values = {part: _value(record, column) for part, column in chosen.items()}
            parts = how.convert(values, f"row {number}")
            row = _row(parts, records, max_pixels, f"row {number}")
            used = {each for column in chosen.values() if column for each in column.split(",")}
            meta = _json(_rest(record, used) | parts.meta)
        except Unfit as error:
            yield Broken(source, number, error.reason, error.detail)
        except ValueError as error:  # ConfigError is one
            yield Broken(source, number, "bad_row", " ".join(str(error).split()).removeprefix(f"row {number}: "))
        else:
            yield {**row, "source": source, "source_row": number, "meta": meta}


def find_reader(name: str) -> Reader:
    """The reader of a name. Raises ConfigError for an unknown one."""
    if name not in READERS:
        raise ConfigError(f"no reader '{name}'; there are {', '.join(READERS)}")
    return READERS[name]


def source_name(path: str, reader: str = "generic", split: str = "train") -> str:
    """What rows of a source are marked with: the reader, or for the generic one the hub name, folder or file; with
    @SPLIT where it is not the training split.
    """
    local = Path(path).expanduser()
    if reader != "generic":
        name = reader
    elif local.exists():
        name = local.stem if local.is_file() else local.resolve().name
    else:
        name = path
    return name if split == "train" or local.is_file() else f"{name}@{split}"


def _columns(how: Reader, records: Records, given: dict[str, str], path: str) -> dict[str, str | None]:
    """Our parts -> the source's columns, None where an optional one is missing."""
    seen = f"the columns are {', '.join(records.columns) or 'none'}"
    if "image" in given:
        given["images"] = given.pop("image")
    if given and how.name != "generic":
        raise ConfigError(f"{path}: `columns` is for the generic reader; {how.name} knows its columns")
    if unknown := [part for part in given if part not in PARTS]:
        raise ConfigError(f"{path}: columns names '{unknown[0]}'; known are {', '.join(PARTS)}")
    chosen = {}
    for key, candidates in how.columns.items():
        part = key.removesuffix("?")
        names = [given[part]] if part in given else [name for name in candidates if name in records.columns]
        if part in given:
            if missing := [column for column in given[part].split(",") if column not in records.columns]:
                raise ConfigError(f"{path}: no column {missing[0]} for {part}; {seen}")
        elif len(names) > 1:
            raise ConfigError(f"{path}: {part} could be {' or '.join(names)}; say which by `columns`; {seen}")
        elif not names and part == key:
            more = "; say which it is by `columns`" if how.name == "generic" else ""
            raise ConfigError(f"{path}: reader {how.name} needs a column {' or '.join(candidates)}{more}; {seen}")
        chosen[part] = names[0] if names else None
    return chosen


def _value(record: dict, column: str | None) -> Any:
    if column is None or "," not in column:
        return record.get(column)
    return [record[each] for each in column.split(",") if record.get(each) not in (None, "")]


def _row(parts: Parts, records: Records, max_pixels: int, where: str) -> dict:
    """The schema's content columns. Raises Unfit or ValueError."""
    if not isinstance(parts.question, str) or not parts.question.strip():
        raise Unfit("no_question", f"the question is {parts.question!r}")
    answer = parts.answer
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise Unfit("no_answer", f"the answer is {str(answer)[:60]!r}; wanted text or a number")
    answer = str(answer).strip()
    if not answer:
        raise Unfit("no_answer", "the answer is empty")
    try:
        images = stored_images(parts.images)
        if not images:
            raise Unfit("no_image", "no image")
        images = [encoded(located(image, records.folders), None, max_pixels, where) for image in images]
    except ConfigError as error:
        raise Unfit("bad_image", str(error).removeprefix(f"{where}: ")) from error
    choices = choices_of(parts.choices)
    if len(choices) > 26:
        raise Unfit("bad_row", f"{len(choices)} choices; there are letters for 26")
    question = with_options(parts.question.strip(), choices) if choices else parts.question.strip()
    (turn,) = placed([{"role": "user", "content": question}], len(images), where)
    return {
        "id": content_id(turn["content"], answer, choices, (image["bytes"] for image in images)),
        "question": turn["content"],
        "answer": answer,
        "choices": choices,
        "images": images,
    }


def _rest(record: Mapping[str, Any], used: Container[str]) -> dict[str, Any]:
    """Columns that are in no part of the row. Of a file in the schema, its rows' own meta and where they came from."""
    if set(record) == set(ROWS.names):
        if not isinstance(meta := json.loads(record["meta"]), dict):
            raise ValueError(f"meta is no JSON object: {record['meta'][:80]}")
        return {name: record[name] for name in ("source", "source_row")} | meta
    return {key: value for key, value in record.items() if key not in used}


def _json(meta: Mapping[str, Any]) -> str:
    """A JSON object of what can be said in JSON; files inside a record are left out."""
    return json.dumps(_plain(meta), ensure_ascii=False, default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if not isinstance(item, bytes)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value if not isinstance(item, bytes)]
    return value
