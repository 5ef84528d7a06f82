"""The part of a response that a harness gets to see, so that its extractors read no chain of thought."""

from __future__ import annotations

# Instead of an empty answer: VLMEvalKit takes that for a broken call and asks again. It holds no letter, digit or word.
NO_ANSWER = "-"


def answer_part(response: str, finish: str) -> str:
    """What stands in the last closed <answer>, else behind </think>, else all; NO_ANSWER for what was not finished.

    finish: the API's finish_reason. A response that ran into the token limit ("length") before its answer closed has
    none: letters of a cut-off chain are not an answer.
    """
    before, closed, _ = response.rpartition("</answer>")
    if closed:
        text = before.rpartition("<answer>")[2]
    elif finish == "length" or "<answer>" in response:
        return NO_ANSWER
    else:
        _, ended, text = response.rpartition("</think>")
        if not ended and "<think>" in text:
            return NO_ANSWER
    return text.strip() or NO_ANSWER
