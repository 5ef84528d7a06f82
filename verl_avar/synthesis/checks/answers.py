"""Whether a reply's final answer is the row's, choices included. Answers are compared by `evaluation.scoring` alone."""

from __future__ import annotations

import re
from collections.abc import Sequence

from verl_avar.evaluation.scoring import read_answer, same_answer

_LONGEST = 1000  # characters; longer answers are none, and scoring's patterns are not made for them
_LABELLED = re.compile(r"\(?([A-Z])(?:\)[.:]?|[.:])\s*(\S.*)", re.DOTALL)
_LETTER = re.compile(r"(?:(?:option|choice)\s*:?\s*)?\(?([A-Z])\)?[.:]?", re.IGNORECASE)


def wrong_answer(text: str, truth: str, choices: Sequence[str]) -> str | None:
    """What is wrong with the answer of a reply in <think>…</think><answer>…</answer>, in words; None if it is right.

    With choices, the option's letter, its text and both ("B. 5 cm") are right, whichever of them the row's answer is;
    a letter with another option's text is not. A truth that is a letter names the option even where the options'
    texts are letters too.
    """
    given = text.rpartition("</answer>")[0].rpartition("<answer>")[2]
    if len(given) > _LONGEST:
        return f"the answer has {len(given)} characters; at most {_LONGEST} are read"
    answer = read_answer(text if len(text) <= _LONGEST else f"<answer>{given}</answer>")
    if answer is None:
        return "there is no answer to read"
    if _right(answer, truth, choices):
        return None
    return f"'{_line(answer)}' in place of '{_line(truth)}'"


def _right(answer: str, truth: str, choices: Sequence[str]) -> bool:
    index = _option(truth, choices)
    if index is None:
        labelled = None if choices else _LABELLED.fullmatch(truth.strip())
        return same_answer(answer, truth) or bool(
            labelled and (same_answer(answer, labelled[1]) or same_answer(answer, labelled[2]))
        )
    letter = _LETTER.fullmatch(answer.strip("$*\"'` "))
    if letter and _position(letter[1]) < len(choices):
        return _position(letter[1]) == index
    if same_answer(answer, choices[index]):
        return True
    if not same_answer(answer, chr(ord("A") + index)):
        return False
    rest = _LABELLED.fullmatch(answer.strip("$*\"'` "))
    others = (choice for other, choice in enumerate(choices) if other != index)
    # "B. 7 cm" where B is 5 cm and C is 7 cm: it can't be told which is meant.
    return rest is None or same_answer(rest[2], choices[index]) or not any(same_answer(rest[2], o) for o in others)


def _option(truth: str, choices: Sequence[str]) -> int | None:
    """The option that the row's answer names: by letter, by letter and text, or by text; None without such a one."""
    truth = truth.strip()
    letter = re.fullmatch(r"\(?([A-Z])\)?[.:]?", truth)
    if letter and _position(letter[1]) < len(choices):
        return _position(letter[1])
    labelled = _LABELLED.fullmatch(truth)
    position = _position(labelled[1]) if labelled else len(choices)
    if position < len(choices) and _same_text(labelled[2], choices[position]):
        return position
    same = [index for index, choice in enumerate(choices) if _same_text(truth, choice)]
    return same[0] if len(same) == 1 else None


def _position(letter: str) -> int:
    return ord(letter.upper()) - ord("A")


def _same_text(a: str, b: str) -> bool:
    return " ".join(a.split()).casefold() == " ".join(b.split()).casefold()


def _line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 80 else f"{line[:79]}…"
