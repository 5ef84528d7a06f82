"""What a harness gets to see of a response, so that its extractors read no chain of thought."""

from __future__ import annotations

from verl_avar.evaluation.benchmark.score import answer_part

# Instead of an empty answer: VLMEvalKit takes that for a broken call and asks again. It holds no letter, digit or word.
NO_ANSWER = "-"


def shown(response: str, finish: str) -> str:
    """The part that our own rules read (`score.answer_part`); NO_ANSWER where a response has none."""
    return answer_part(response, finish).text or NO_ANSWER
