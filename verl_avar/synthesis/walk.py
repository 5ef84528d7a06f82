"""A row's way through the stages: which call comes next, and what became of the row, as a function of answers alone.

The run walks with calls that reach endpoints; afterwards the same walk over stored answers says what became of every
row, so that changed checks or thresholds need no new calls.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_avar.calls.answer import BAD_REQUEST
from verl_avar.calls.store import call_key
from verl_avar.data.choices import with_options
from verl_avar.data.schema import IMAGE
from verl_avar.synthesis.checks import Context, Problem
from verl_avar.synthesis.outcomes import ACCEPTED, PENDING, REJECTED, STAGES, TEXTS
from verl_avar.synthesis.prompt import render

CALL_FAILED = "call_failed"


@dataclass(frozen=True)
class Ask:
    """One call that a row needs. `key` is a hash of everything that decides the answer."""

    key: str
    stage: str
    candidate: int
    attempt: int
    model: str
    sampling: dict[str, Any]
    context: Context


class Unanswered(Exception):
    """A call has no answer; reason: call_failed, or pending where it has not been tried to its end."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(detail)
        self.reason, self.detail = reason, detail


Asker = Callable[[Ask], Awaitable[dict]]  # -> record of the call: text, finish, prompt_tokens, …; or Unanswered
Checker = Callable[[str, str, str, Context], Awaitable[Problem | None]]  # (stage, text, finish, context)


@dataclass
class Walk:
    """How far a row came."""

    status: str = PENDING
    stage: str | None = None
    problem: Problem | None = None
    texts: dict[str, str] = field(default_factory=dict)  # of stages
    candidates: list[dict] = field(default_factory=list)  # those that were not kept
    calls: list[dict] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)  # anchored chains that attention is to choose from

    def columns(self) -> dict:
        """The columns of outcomes.OUTCOMES that the walk decides."""
        return {
            "status": self.status,
            "stage": self.stage,
            "reason": self.problem and self.problem.reason,
            "detail": self.problem and self.problem.detail,
            **{column: self.texts.get(stage) for stage, column in TEXTS.items()},
            "candidates": self.candidates,
            "calls": len(self.calls),
            **{name: sum(call[name] for call in self.calls) for name in ("prompt_tokens", "completion_tokens", "cost")},
        }


async def walk(row: dict, config: DictConfig, attempts: Callable[[str, str], int], ask: Asker, check: Checker) -> Walk:
    """Takes a row of data/schema.ROWS as far as its answers let it.

    attempts: (row id, stage) -> how often that stage was sent again by `--retry`.
    """
    done = Walk()
    for stage in STAGES:
        done.stage = stage
        settings = config.stages[stage]
        context = _context(row, done.texts)
        asks = [_ask(row, stage, settings, context, number, attempts, config) for number in range(settings.candidates)]
        try:
            kept = await _candidates(asks, settings, context, ask, check, done)
        except Unanswered as error:
            if error.reason != PENDING:
                done.status, done.problem = REJECTED, Problem(error.reason, error.detail)
            return done
        if not kept:
            rejected = [candidate for candidate in done.candidates if candidate["stage"] == stage]
            (reason, _), *_ = Counter(candidate["reason"] for candidate in rejected).most_common(1)
            first = next(candidate for candidate in rejected if candidate["reason"] == reason)
            done.candidates.remove(first)  # shown as the row's own
            if first["text"] is not None:
                done.texts[stage] = first["text"]
            done.status, done.problem = REJECTED, Problem(reason, first["detail"])
            return done
        done.texts[stage] = choose(kept, settings.keep)
        if settings.keep == "attention":
            done.choices = kept
    done.status, done.stage = ACCEPTED, None
    return done


async def _candidates(
    asks: list[Ask], settings: DictConfig, context: Context, ask: Asker, check: Checker, done: Walk
) -> list[str]:
    """The candidates' texts that pass the checks. With keep=first none is asked for after one that does."""
    kept = []
    together = [asks] if settings.keep != "first" else [[one] for one in asks]
    for group in together:
        for one, answer in zip(group, await _all(ask(one) for one in group), strict=True):
            done.calls.append(answer)
            text = answer["text"]
            if answer["finish"] == BAD_REQUEST:
                problem, text = Problem(BAD_REQUEST, text), None  # the endpoint's words, no text of the stage
            else:
                problem = await check(one.stage, text, answer["finish"], context)
            if problem is None:
                kept.append(text)
            else:
                about = {"reason": problem.reason, "detail": problem.detail, "text": text}
                done.candidates.append({"stage": one.stage, "candidate": one.candidate} | about)
        if kept and settings.keep == "first":
            break
    return kept


async def _all(awaitables) -> list:
    """Every result, in order. Where some raise, one's error once all have ended: what was answered is stored. That a
    call has no answer is the least of errors."""
    results = await asyncio.gather(*awaitables, return_exceptions=True)
    if errors := [result for result in results if isinstance(result, BaseException)]:
        raise min(errors, key=lambda error: isinstance(error, Unanswered))
    return results


def choose(texts: Sequence[str], keep: str) -> str:
    """One of a row's passing candidates; for `attention` the first, until the student has been asked."""
    if keep == "most_anchors":
        from verl_avar.synthesis.checks.stages import find_anchors

        return max(texts, key=lambda text: len(find_anchors(text)))
    if keep in ("shortest", "longest"):
        return (min if keep == "shortest" else max)(texts, key=len)
    return texts[0]


def _context(row: dict, texts: dict[str, str]) -> Context:
    return Context(
        question=_worded(with_options(row["question"], row["choices"])),
        answer=row["answer"],
        choices=list(row["choices"]),
        description=texts.get("describe"),
        chain=texts.get("reason"),
    )


def _worded(question: str) -> str:
    """A question for models that get the images apart, or not at all: several placeholders become "[image N]"."""
    count = question.count(IMAGE)
    for number in range(1, count + 1):
        question = question.replace(IMAGE, f"[image {number}]" if count > 1 else "", 1)
    return question.strip()


def _ask(row, stage, settings, context, number, attempts, config) -> Ask:
    attempt = attempts(row["id"], stage)
    messages = prompt(stage, settings, context, len(row["images"]))
    sampling = OmegaConf.to_container(settings.sampling, resolve=True)
    if settings.send_seed:  # else candidates and retries of a deterministic server would all be the same
        draw = random.Random(f"{config.seed} {row['id']} {stage} {number} {attempt}")
        sampling = {"seed": draw.randrange(2**31)} | sampling
    parts = [row["id"], stage, messages, settings.model, sampling, settings.images, settings.reasoning]
    return Ask(call_key(*parts, number, attempt), stage, number, attempt, settings.model, sampling, context)


def prompt(stage: str, settings: DictConfig, context: Context, images: int, data: Sequence[bytes] = ()) -> list[dict]:
    """The messages of a stage. images: how many the row has; data: those to send."""
    words = {
        "question": context.question,
        "answer": context.answer,
        "choices": list(context.choices),
        "description": context.description or "",
        "chain": context.chain or "",
        "images": images,
    }
    return render(settings.prompt, stage, words, data or None)
