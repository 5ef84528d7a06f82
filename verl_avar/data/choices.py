"""The options of multiple-choice questions: a list of texts, and the same as lines "A. …" of the question."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

LABELLED = re.compile(r"^\s*\(?([A-Z])\s*[.):、]\s*(.*)$")  # "A. red", "(A) red", "A: red"


def choices_of(value: Any) -> list[str]:
    """Texts of the options A, B, … without their letters, however a data set stores them; [] for none.

    A list of texts, with letters or not; an object {"A": text, …}; a list or object written as text; or text with one
    labelled option a line. Raises ValueError for anything else, and for letters that are not A, B, … in order.
    """
    if value is None or value == "":
        return []
    if isinstance(value, str):
        return _of_text(value)
    if isinstance(value, Mapping):
        given = {str(key).strip(): text for key, text in value.items() if text is not None}
        _check_letters(sorted(given))
        return [str(given[letter]).strip() for letter in sorted(given)]
    if isinstance(value, Sequence):
        texts = [str(text).strip() for text in value if text is not None]
        return _unlabelled(texts)
    raise ValueError(f"choices must be a list, an object or lines, they are {type(value).__name__}")


def _of_text(text: str) -> list[str]:
    if text.strip()[:1] in ("[", "{"):
        try:
            return choices_of(ast.literal_eval(text.strip()))
        except SyntaxError:
            raise ValueError(f"choices begin with '{text.strip()[0]}' but are no list: {text[:40]!r}") from None
    found = [LABELLED.match(line) for line in text.splitlines() if line.strip()]
    if not found or not all(found):
        raise ValueError(f"choices must be lines such as 'A. …', they are {text[:40]!r}")
    _check_letters([match[1] for match in found])
    return [match[2].strip() for match in found]


def _unlabelled(texts: list[str]) -> list[str]:
    """Without letters, where every text has the letter of its place."""
    found = [LABELLED.match(text) for text in texts]
    if all(found) and [match[1] for match in found] == list(ascii_uppercase[: len(texts)]):
        return [match[2].strip() for match in found]
    return texts


def _check_letters(letters: list[str]) -> None:
    if letters != list(ascii_uppercase[: len(letters)]):
        raise ValueError(f"choices must be labelled A, B, … in order, they are {', '.join(letters)}")


def option_lines(choices: Sequence[str]) -> str:
    """The options as lines: "A. red\nB. blue"."""
    return "\n".join(f"{letter}. {text}" for letter, text in zip(ascii_uppercase, choices, strict=False))


def with_options(question: str, choices: Sequence[str]) -> str:
    """The question with its options: as it is where each stands in it after its letter, else as lines at its end."""
    words = " ".join(question.split())
    patterns = (
        rf"(?:^|[\s(]){letter}\s*[.):]\s*{re.escape(' '.join(text.split()))}"
        for letter, text in zip(ascii_uppercase, choices, strict=False)
    )
    if all(re.search(pattern, words) for pattern in patterns):
        return question
    return f"{question.rstrip()}\n{option_lines(choices)}"


def letter_of(answer: str, choices: Sequence[str]) -> str:
    """The letter of the one option that the answer repeats, case aside; else the answer as it is."""
    same = [letter for letter, text in zip(ascii_uppercase, choices, strict=False) if text == answer] or [
        letter for letter, text in zip(ascii_uppercase, choices, strict=False) if text.casefold() == answer.casefold()
    ]
    return same[0] if len(same) == 1 else answer
