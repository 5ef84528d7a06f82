"""One record of a benchmark's copy as a question."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from verl_avar.data.choices import choices_of, letter_of
from verl_avar.data.images import encoded, located, stored_images
from verl_avar.data.published import placed
from verl_avar.data.schema import IMAGE
from verl_avar.evaluation.benchmark.definition import Benchmark, Layout, Part

EMPTY = (None, "", [])
# "Hint: …\nQuestion: What is x? (Unit: cm)\nChoices:\n(A) 1\n(B) 2", MathVista's query, which VLMEvalKit's TSV repeats.
INSTRUCTED = re.compile(r"\s*Hint:[^\n]*\n+Question:\s*(.*?)\s*(?:\nChoices:\s*\n\(A\).*)?\s*", re.DOTALL)
INLINE = re.compile(r"(.*?)\s*\bOptions:\s*A:\s*(.*)", re.DOTALL)  # MMStar
NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:/\d+)?")
DRAWN = re.compile(r"^\s*([A-Z])\s*[:.]\s*(.*)$")  # "A:40°", MathVerse


class LeftOut(Exception):
    """A record that the benchmark does not ask."""


def question_of(record: dict, benchmark: Benchmark, part: Part, layout: Layout, folders: Sequence[Path]) -> dict:
    """A row of schema.QUESTIONS; its id is the copy's. Raises LeftOut, and ValueError for a record that is no question.

    meta holds the layout's columns, and where they apply: `part`; `asked`, the question as the copy words it with the
    publisher's instructions; `turns`, messages before the question; `options_in_image`; `also_right`, other right
    answers (for a choice letters); `images_not_shown`, how many the text does not name.
    """
    meta = {name: _jsonable(value_of(record, column)) for name, column in layout.meta.items()}
    meta = {name: value for name, value in meta.items() if value not in EMPTY}
    identity = _identity(record, layout)
    if layout.id_pattern:
        match = re.fullmatch(layout.id_pattern, identity)
        if match is None:
            raise ValueError(f"the id '{identity}' is not as {layout.id_pattern}")
        meta |= match.groupdict()
    images = _images(record, layout)
    if not images and benchmark.without_image == "leave_out":
        raise LeftOut
    if not images and benchmark.without_image == "broken":
        raise ValueError("no image")
    text, choices = _texts(record, part, layout)
    if layout.turns:
        meta["turns"] = _turns(record, layout)[:-1]
    if not text:
        raise ValueError("no question")
    if ready := first(record, (layout.ready,) if layout.ready else ()):
        meta["asked"] = str(ready)
    kind = _kind(record, benchmark, choices)
    answer, others = _answer(record, benchmark, layout, kind, choices)
    if benchmark.plain_numbers and kind == benchmark.open_type and NUMBER.fullmatch(answer):
        kind = "number"
    if others:
        meta["also_right"] = others
    text, choices, shown = _placed(text, choices, images, benchmark, part)
    if hidden := len(images) - len(set(shown)):
        meta["images_not_shown"] = hidden
    if part.options_in_image:
        meta["options_in_image"] = True
    if len(benchmark.parts) > 1:
        meta["part"] = part.name
    files = {n: encoded(located(images[n], folders), None, sys.maxsize, "the row") for n in dict.fromkeys(shown)}
    return {
        "benchmark": benchmark.name,
        "id": identity,
        "question": text,
        "choices": choices,
        "answer": answer,
        "answer_type": kind,
        "images": [files[number] for number in shown],
        "meta": json.dumps(meta, ensure_ascii=False, sort_keys=True),
    }


def value_of(record: Mapping[str, Any], column: str) -> Any:
    """The value of a column; "a.b" is b of the object in a, which may be an object written as text."""
    if column in record:
        return record[column]
    head, dot, rest = column.partition(".")
    inner = record.get(head)
    if not dot or inner in EMPTY:
        return None
    if isinstance(inner, str):
        try:
            inner = ast.literal_eval(inner)
        except (SyntaxError, ValueError):
            raise ValueError(f"{head} is no object: {inner[:40]}") from None
    if not isinstance(inner, Mapping):
        raise ValueError(f"{head} is no object: {str(inner)[:40]}")
    return value_of(inner, rest)


def first(record: Mapping[str, Any], columns: Sequence[str]) -> Any:
    """The value of the first column that is not empty; None for none."""
    return next((value for value in (value_of(record, column) for column in columns) if value not in EMPTY), None)


def _identity(record: Mapping[str, Any], layout: Layout) -> str:
    for column in layout.id:
        values = [value_of(record, each) for each in column.split("+")]
        if all(value not in EMPTY for value in values):
            return "_".join(str(value).strip() for value in values)
    raise ValueError(f"no id in {' or '.join(layout.id)}")


def _texts(record: Mapping[str, Any], part: Part, layout: Layout) -> tuple[str, list[str]]:
    """Question and options, as the copy has them."""
    if layout.turns:
        return _turns(record, layout)[-1]["content"], []
    text = part.asks
    if text is None and layout.question is not None:
        text = value_of(record, layout.question)
        if isinstance(text, list):  # a conversation
            text = "".join(turn["content"] for turn in text if turn["role"] == "user")
    text = "" if text is None else str(text).strip()
    if layout.instructed and (match := INSTRUCTED.fullmatch(text)):
        text = match[1]
    if layout.unit and (unit := value_of(record, layout.unit)) not in EMPTY:
        text = f"{text} (Unit: {unit})"
    if layout.inline_options:
        return _inline(text)
    if layout.choices == "A-Z":
        return text, _lettered(record)
    if layout.choices == "Choices:":
        return text, _drawn(str(value_of(record, layout.options_of or "") or ""))
    if layout.choices:
        return text, choices_of(value_of(record, layout.choices))
    return text, []


def _turns(record: Mapping[str, Any], layout: Layout) -> list[dict[str, str]]:
    """The messages of a conversation, content parts as text with IMAGE; the last is a user's, the only with images."""
    given = value_of(record, layout.question or "")
    if not isinstance(given, list) or not given:
        raise ValueError(f"{layout.question} is no conversation")
    turns = [{"role": str(turn["role"]), "content": _content(turn["content"])} for turn in given]
    if turns[-1]["role"] != "user":
        raise ValueError("the conversation does not end with a user's turn")
    if any(IMAGE in turn["content"] for turn in turns[:-1]):
        raise ValueError("an image before the last turn")
    return turns


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    if unknown := [part["type"] for part in content if part["type"] not in ("text", "image")]:
        raise ValueError(f"a content part of type {unknown[0]}")
    return "".join(IMAGE if part["type"] == "image" else part["text"] for part in content)


def _lettered(record: Mapping[str, Any]) -> list[str]:
    """Options of the columns A, B, …; those after the last one that a row has are empty."""
    cells = [record.get(letter) for letter in ascii_uppercase]
    last = max((n for n, cell in enumerate(cells) if cell not in EMPTY), default=-1)
    if gaps := [n for n in range(last) if cells[n] in EMPTY]:
        raise ValueError(f"option {ascii_uppercase[gaps[0]]} is empty, but not the ones after it")
    return [str(cell).strip() for cell in cells[: last + 1]]


def _inline(text: str) -> tuple[str, list[str]]:
    """ "…? Options: A: red, B: blue" as its question and options; as it is where the letters are not just A, B, … ."""
    match = INLINE.fullmatch(text)
    if not match:
        return text, []
    pieces = re.split(r",?\s+([B-J]):\s+", match[2])
    letters = ["A", *pieces[1::2]]
    if len(letters) < 2 or letters != list(ascii_uppercase[: len(letters)]) or not all(map(str.strip, pieces[::2])):
        return text, []
    return match[1], [piece.strip() for piece in pieces[::2]]


def _drawn(text: str) -> list[str]:
    """Options after the line "Choices:"; [] where there are none, or where their lines are not A, B, … in order."""
    _, found, lines = text.partition("Choices:")
    matches = [DRAWN.match(line) for line in lines.splitlines() if line.strip()]
    letters = [match[1] for match in matches if match]
    if not found or len(letters) < len(matches) or letters != list(ascii_uppercase[: len(letters)]):
        return []
    return [match[2].strip() for match in matches if match]


def _images(record: Mapping[str, Any], layout: Layout) -> dict[int, Any]:
    """The images by their numbers from 1: of their columns where there are several, else their places in the cell."""
    cells = [stored_images(value_of(record, column)) for column in layout.images]
    if len(cells) == 1:
        return dict(enumerate(cells[0], start=1))
    return {number: cell[0] for number, cell in enumerate(cells, start=1) if cell}


def _placed(
    text: str, choices: list[str], images: Mapping[int, Any], benchmark: Benchmark, part: Part
) -> tuple[str, list[str], list[int]]:
    """Question and options with IMAGE where the benchmark's placeholders are, and the numbers of the images in order.

    Where there are none the images come first, all of them.
    """
    if benchmark.placeholder is not None:
        pattern = re.compile(re.escape(benchmark.placeholder).replace(re.escape("{n}"), r"(\d+)"))
        if benchmark.several_in_one:
            placed_text, found = pattern.subn(IMAGE * len(images), text, count=1)
            return placed_text if found else IMAGE * len(images) + text, choices, sorted(images)
        texts = [text] if part.options_in_image else [text, *choices]
        found = [int(number) for each in texts for number in pattern.findall(each)]
        if absent := [number for number in found if number not in images]:
            raise ValueError(
                f"the text names image {absent[0]}; the images are {', '.join(map(str, images)) or 'none'}"
            )
        if found:
            text, *shown = [pattern.sub(IMAGE, each) for each in texts]
            return text, shown or choices, found
    (turn,) = placed([{"role": "user", "content": text}], len(images), "the row")
    return turn["content"], choices, sorted(images)


def _kind(record: Mapping[str, Any], benchmark: Benchmark, choices: list[str]) -> str:
    marked = [(str(value_of(record, name)), values) for name, values in benchmark.choice_when.items()]
    if any(value in values for value, values in marked) or (not marked and choices):
        return "choice"
    if benchmark.open_by is None:
        return benchmark.open_type
    value = str(value_of(record, benchmark.open_by))
    if value not in benchmark.open_types:
        raise ValueError(f"{benchmark.open_by} is '{value}'; known are {', '.join(benchmark.open_types)}")
    return benchmark.open_types[value]


def _answer(
    record: Mapping[str, Any], benchmark: Benchmark, layout: Layout, kind: str, choices: list[str]
) -> tuple[str, list[str]]:
    """The right answer, and others that are right too."""
    given = first(record, layout.answer)
    if given is None:
        raise ValueError("no answer")
    text = str(given).strip()
    if layout.answer_is:
        if text not in layout.answer_is:
            raise ValueError(f"the answer is '{text}'; known are {', '.join(layout.answer_is)}")
        text = layout.answer_is[text]
    if kind != "choice":
        several = _listed(text) if benchmark.several_answers else []
        return (several[0], several[1:]) if several else (text, [])
    if layout.answer_is_text or not re.fullmatch("[A-Z]", text):
        same = [letter for letter, option in zip(ascii_uppercase, choices, strict=False) if option == text]
        letters = same or [letter_of(text, choices)]  # two options may read the same
    else:
        letters = [text]
    if not re.fullmatch("[A-Z]", letters[0]):
        raise ValueError(f"the answer '{text[:60]}' is neither a letter nor one of the {len(choices)} options")
    if choices and ascii_uppercase.index(letters[0]) >= len(choices):
        raise ValueError(f"the answer is {letters[0]}, but there are {len(choices)} options")
    return letters[0], letters[1:]


def _listed(text: str) -> list[str]:
    """Texts of a list written in Python; [] for anything else."""
    if not (text.startswith("[") and text.endswith("]")):
        return []
    try:
        values = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return []
    return [str(value) for value in values]


def _jsonable(value: Any) -> Any:
    if isinstance(value, str):
        return _listed(value) or value  # a list is a text in a TSV
    return value if isinstance(value, int | float | bool | list | None) else str(value)
