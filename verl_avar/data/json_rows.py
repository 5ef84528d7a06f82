"""Rows of JSON files, read a piece at a time: JSON Lines, an array of objects, or an object of objects."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from verl_avar.errors import ConfigError

CHUNK = 1 << 20  # characters read at a time
SPACE = " \t\r\n"
OF_OBJECTS = re.compile(r'\{\s*"(?:[^"\\]|\\.)*"\s*:\s*\{')  # {"0": {…


def json_rows(path: Path) -> Iterator[dict | ValueError]:
    """The objects of a file. `.jsonl` is read as JSON Lines; what `.json` is, its beginning says.

    A line of JSON Lines that is no object comes as a ValueError that says so. Raises ConfigError for a file that is
    none of these, and where an array or object breaks off: what follows can't be told.
    """
    with path.open(encoding="utf-8-sig") as file:
        start = file.read(CHUNK)
        file.seek(0)
        lines = path.suffix == ".jsonl" or _has_objects_by_line(start.lstrip(SPACE))
        try:
            yield from _lines(file) if lines else _members(file, path)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not UTF-8: {error}") from None


def _has_objects_by_line(start: str) -> bool:
    """Whether the first line is a row by itself, or the beginning of one that is longer than what was read."""
    if not start.startswith("{"):
        return False
    first, ended, _ = start.partition("\n")
    try:
        values = list(json.loads(first).values())
    except ValueError:
        return not ended and not OF_OBJECTS.match(first)
    return not values or not all(isinstance(value, dict) for value in values)


def _lines(file: TextIO) -> Iterator[dict | ValueError]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            row = ValueError(f"line {number} is no JSON: {error}")
        yield (
            row
            if isinstance(row, dict | ValueError)
            else ValueError(f"line {number} is no object: {line.strip()[:40]!r}")
        )


def _members(file: TextIO, path: Path) -> Iterator[dict | ValueError]:
    """Members of the array or object that fills the file; of an object the values."""
    text = _Text(file, path)
    opening = text.sign()
    if opening not in ("[", "{"):
        raise ConfigError(f"{path}: neither JSON Lines nor a JSON array or object of rows")
    closing = "]" if opening == "[" else "}"
    number = 0
    if text.peek() == closing:
        return
    while True:
        if opening == "{":
            text.value()
            if text.sign() != ":":
                raise ConfigError(f"{path}: no JSON at member {number}")
        row = text.value()
        yield row if isinstance(row, dict) else ValueError(f"member {number} is no object: {str(row)[:40]!r}")
        number += 1
        following = text.sign()
        if following == closing:
            return
        if following != ",":
            raise ConfigError(f"{path}: no JSON after member {number - 1}; {number} rows were read")


class _Text:
    """A file's text, of which no more is held than the value that is being read."""

    def __init__(self, file: TextIO, path: Path):
        self.file, self.path = file, path
        self.held, self.at = "", 0
        self.decoder = json.JSONDecoder()

    def more(self) -> bool:
        chunk = self.file.read(max(CHUNK, len(self.held) - self.at))
        self.held, self.at = self.held[self.at :] + chunk, 0
        return bool(chunk)

    def peek(self) -> str:
        """The next sign that is no white space; "" at the end."""
        while True:
            while self.at < len(self.held) and self.held[self.at] in SPACE:
                self.at += 1
            if self.at < len(self.held):
                return self.held[self.at]
            if not self.more():
                return ""

    def sign(self) -> str:
        found = self.peek()
        self.at += 1
        return found

    def value(self) -> object:
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.held, self.at)
            except ValueError as error:
                if self.more():
                    continue
                raise ConfigError(f"{self.path}: breaks off, or is no JSON: {error}") from None
            if end < len(self.held) or not self.more():  # a number at the end of a piece may go on
                self.at = end
                return value
