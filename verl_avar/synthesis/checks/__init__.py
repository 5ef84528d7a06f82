"""What a stage's text must be to be kept: each check is a reason code and a line that says what it saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """Why a text is not kept."""

    reason: str  # code: refusal, wrong_answer, …
    detail: str  # one line for a person, with the words or numbers that were seen


@dataclass(frozen=True)
class Context:
    """What a text is checked against. Later stages know the texts of earlier ones."""

    question: str
    answer: str
    choices: Sequence[str] = ()
    description: str | None = None
    chain: str | None = None  # the reasoning before anchoring
