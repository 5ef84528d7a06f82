"""One response, judged by rules: which part is the answer, what it says, and whether that is right."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from verl_avar.evaluation.benchmark.choices import read_choice
from verl_avar.evaluation.benchmark.values import (
    is_list,
    read_value,
    read_yes_no,
    same_list,
    same_value,
    same_yes_no,
    without_unit,
)
from verl_avar.evaluation.scoring import SAYS, all_boxed, plain, same_answer

# Problems that say nothing was read, and that something was, but not as it should be.
UNREAD = ("failed", "truncated", "no_answer")
READ = ("format", "several_answers", "contradiction")
_SAYS = re.compile(
    r"\b(?:option|choice)\s+(?:is|would\s+be|should\s+be)\s*:?\s*(.+?)\s*(?=\.(?:\s|$)|\n|$)"
    r"|(?:答案|结果)\s*(?:应该|应)?(?:是|为|选)?\s*[:：]?\s*(.+?)\s*(?=。|\n|$)|故?应?选择?\s*([A-JＡ-Ｊ](?![A-Za-z]).*?)(?=[,，。]|\n|$)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Score:
    """extracted: the answer as it was read, a letter of the options, Yes or No, or text; None: nothing was read.

    right: None only where there is no response. problem: one of UNREAD or READ, or None. `several_answers` goes with a
    right answer where the last of several final statements is right, and is wrong where one statement names several.
    """

    extracted: str | None
    right: bool | None
    problem: str | None


@dataclass(frozen=True)
class Part:
    """The part of a response that answers; text None: there is none, for the reason in `problem`."""

    text: str | None
    tagged: bool
    problem: str | None


def answer_part(response: str, finish: str) -> Part:
    """What a response gives as its answer: the last <answer>…</answer> after the reasoning, else all after </think>.

    finish: the API's finish_reason. A response that ends inside its reasoning has no answer, whatever letters are in
    it; ended by the token limit it is `truncated`. So is one without </think> or <answer> that hit the limit.
    """
    cut = Part(None, False, "truncated" if finish != "stop" else "no_answer")
    chain, ended, after = response.rpartition("</think>")
    text = after if ended else response
    before, closed, behind = text.rpartition("</answer>")
    if closed:
        # "The format is <answer>…</answer>" inside a chain that was cut off answers nothing.
        if "<think>" in text and finish == "length" and behind.strip():
            return cut
        return _part(before.rpartition("<answer>")[2], True)
    _, opened, rest = text.rpartition("<answer>")
    if opened:  # a stop string takes the closing tag with it
        return cut if finish == "length" else _part(rest, False)
    if ended and not after.strip() and "</answer>" in chain:  # answered first, reasoned afterwards
        return _part(chain.rpartition("</answer>")[0].rpartition("<answer>")[2], True)
    if finish == "length" or (not ended and "<think>" in text):
        return cut
    return _part(text, False)


def _part(text: str, tagged: bool) -> Part:
    return Part(text.strip() or None, tagged, None if text.strip() else "no_answer")


def score(question: Mapping[str, Any], response: str | None, finish: str, tagged: bool = True) -> Score:
    """The score of a response to a question (schema.QUESTIONS; of `meta`: precision, unit, also_right).

    finish: the API's finish_reason. tagged: whether the protocol asks for <answer>; a response without one is then a
    `format` problem, and judged by what it says. meta: `precision`, decimals that a number counts to; `unit`, of the
    right answer; `also_right`, further right ones.
    """
    if response is None:
        return Score(None, None, "failed")
    part = answer_part(response, finish)
    if part.text is None:
        return Score(None, False, part.problem)
    meta = json.loads(question.get("meta") or "{}")
    statements = _statements(part)
    read = [_read(question, statement) for statement in statements if statement]
    if not statements[-1] or not read:  # a \boxed{ that is empty or does not close
        return Score(None, False, "truncated" if finish == "length" else "no_answer")
    extracted, problem = read[-1]
    if extracted is None:
        return Score(None, False, problem)
    others = {text for text, _ in read[:-1] if text is not None}
    if any(not _right(question, text, extracted, meta) for text in others):
        problem = "several_answers"
    truths = [question["answer"], *meta.get("also_right", ())]
    right = any(_right(question, extracted, truth, meta) for truth in truths)
    return Score(extracted, right, problem or ("format" if tagged and not part.tagged else None))


def _statements(part: Part) -> list[str | None]:
    """What an answer states, in order: boxes, else what follows "answer is", else all, or its last line."""
    if "\\boxed" in part.text:
        return all_boxed(part.text)
    found = [*SAYS.finditer(part.text), *_SAYS.finditer(part.text)]
    said = [next(g for g in match.groups() if g) for match in sorted(found, key=lambda match: match.start())]
    said = [statement for statement in said if plain(statement).strip("*: ")]
    if said:
        return said
    return [part.text if part.tagged else part.text.strip().splitlines()[-1]]


def _kind(question: Mapping[str, Any]) -> str:
    return "choice" if len(question["choices"]) else question["answer_type"]


def _read(question: Mapping[str, Any], text: str) -> tuple[str | None, str | None]:
    kind = _kind(question)
    if kind == "choice":
        return read_choice(text, question["choices"])
    if kind == "yes_no":
        return read_yes_no(text, question["question"])
    if kind == "number" and not is_list(question["answer"]):
        value, problem = read_value(text)
        return (value, problem) if value is not None else (_formula(text), None) if "\\" in text else (None, problem)
    return _formula(text), None


def _formula(text: str) -> str:
    """The only formula between dollars or \\( \\) in a sentence, else the text."""
    found = re.findall(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", text, re.DOTALL)
    return next(part for part in found[0] if part) if len(found) == 1 else text.strip()


def _right(question: Mapping[str, Any], answer: str, truth: str, meta: Mapping[str, Any]) -> bool:
    kind, precision = _kind(question), meta.get("precision")
    precision = None if precision in (None, "") else int(float(precision))
    if kind == "choice":
        return answer == plain(truth).strip("()").upper()
    if kind == "yes_no":
        return same_yes_no(answer, truth)
    if is_list(truth) and kind in ("number", "text"):
        return same_list(answer, truth, precision)
    given = [answer]
    stated = re.split(r"=|≈|\b(?:is|equals)\b|等于|是|为", answer)
    if len(stated) == 2 and "=" not in truth and not re.search(r"\b(?:and|or|not)\b|,|或", answer):
        given.append(stated[1])  # "AC = 5", "the style is Art Nouveau"
    if kind == "text":
        given.append(re.sub(r"\s*\([^()]*\)\W*$", "", answer))  # "Art Nouveau (Jugendstil)"
        return any(same_answer(text, truth) or _spelt(text) == _spelt(truth) for text in given)
    given += [without_unit(text) for text in given]
    return any(same_value(text, truth, precision, meta.get("unit")) for text in given)


def _spelt(text: str) -> str:
    """Words without case, article and final signs."""
    return re.sub(r"^(?:the|an?)\s+", "", plain(text).casefold()).strip(" .,;:!。")
