"""The checks after every stage of VARD (AVAR §4.1, arXiv:2603.03825): the first problem of a stage's text, or none."""

from __future__ import annotations

import re
from typing import Any

from verl_avar.evaluation.scoring import TAGS, is_well_formed
from verl_avar.synthesis.checks import Context, Problem
from verl_avar.synthesis.checks.anchors import Anchor, find_anchors, grounded_share, thinking
from verl_avar.synthesis.checks.answers import wrong_answer
from verl_avar.synthesis.checks.leaks import find_leak
from verl_avar.synthesis.checks.patterns import compile_all
from verl_avar.synthesis.checks.reasons import REASONS
from verl_avar.synthesis.checks.refusals import find_refusal
from verl_avar.synthesis.checks.words import foreign, loop_at_end, repeated_share, words

__all__ = ["REASONS", "Anchor", "check", "check_settings", "find_anchors"]


def check(stage: str, text: str, finish: str, context: Context, settings: Any) -> Problem | None:
    """The first problem of a model's whole reply, None where it can be kept.

    stage: describe, reason or anchor. finish: the API's finish_reason. settings: TextChecks, for anchor AnchorChecks,
    or a config's block of that form. In this order, the first that applies:

        all      truncated, refusal, empty, language, too_short, too_long, repetition
        reason   format, wrong_answer
        anchor   format, wrong_answer, leak, no_anchors, few_anchors, bunched_anchors, ungrounded_anchors, length_ratio

    Words are those of the whole reply. bunched_anchors needs two anchors, ungrounded_anchors a description in the
    context and length_ratio a chain; each is skipped without. Raises ConfigError for a setting that `check_settings`
    raises for.
    """
    problem = _text_problem(text, finish, settings)
    if problem is None and stage != "describe":
        problem = _answer_problem(text, context)
    if problem is None and stage == "anchor":
        problem = _anchor_problem(text, context, settings)
    return problem


def check_settings(settings: Any) -> None:
    """Raises ConfigError for a bad regular expression or an unknown writing system, so that a run can tell early."""
    foreign("", settings.scripts)
    compile_all(getattr(settings, "leak_phrases", ()), "leak_phrases")
    compile_all(getattr(settings, "anchor_phrases", ()), "anchor_phrases")


def _text_problem(text: str, finish: str, settings: Any) -> Problem | None:
    if finish == "length":
        return Problem("truncated", f"cut off at the token limit after {len(words(text))} words")
    if finish == "content_filter":
        return Problem("refusal", "stopped by the endpoint's content filter")
    if not text.strip():
        return Problem("empty", "no text")
    if settings.refusals and (beginning := find_refusal(text)):
        return Problem("refusal", f"begins: {beginning}")
    share, script = foreign(text, settings.scripts)
    if share > settings.max_foreign:
        return Problem("language", f"{share:.0%} of the letters are foreign, most of them {script}")
    found = words(text)
    if len(found) < settings.min_words:
        return Problem("too_short", f"{len(found)} words, wanted {settings.min_words} or more")
    if len(found) > settings.max_words:
        return Problem("too_long", f"{len(found)} words, wanted {settings.max_words} or fewer")
    return _repetition(text, found, settings.max_repeated)


def _repetition(text: str, found: list[str], limit: float) -> Problem | None:
    if (share := repeated_share(found)) > limit:
        return Problem("repetition", f"{share:.0%} of the runs of words stood before, at most {limit:.0%} may")
    for part in {text, thinking(text)}:
        if (unit := loop_at_end(part)) is not None:
            return Problem("repetition", f"a loop at the end: {unit[:80]}")
    return None


def _answer_problem(text: str, context: Context) -> Problem | None:
    if detail := _malformed(text):
        return Problem("format", detail)
    if detail := wrong_answer(text, context.answer, context.choices):
        return Problem("wrong_answer", detail)
    return None


def _malformed(text: str) -> str | None:
    """What keeps a reply from being well formed, in words; None if it is.

    The tags are looked at before `is_well_formed`, whose pattern takes quadratic time where they are not in place.
    """
    for tag in TAGS:
        if (count := text.count(tag)) != 1:
            return f"{tag} stands {count} times, wanted once"
    inside = text.strip()
    if not inside.startswith(TAGS[0]):
        return f"something stands before {TAGS[0]}"
    if not inside.endswith(TAGS[3]):
        return f"something stands after {TAGS[3]}, or the tags are in another order"
    if not re.search(rf"{TAGS[1]}\s*{TAGS[2]}", inside):
        return f"{TAGS[2]} does not follow {TAGS[1]}"
    chain, _, answer = inside.partition(TAGS[1])
    for part, name in (
        (chain.removeprefix(TAGS[0]), "reasoning"),
        (answer.strip()[len(TAGS[2]) : -len(TAGS[3])], "answer"),
    ):
        if not part.strip():
            return f"the {name} is empty"
    return None if is_well_formed(text) else "not <think>…</think><answer>…</answer>"


def _anchor_problem(text: str, context: Context, settings: Any) -> Problem | None:
    # The words of the question and the options may be quoted.
    asked = " ".join((context.question, *context.choices))
    if leak := find_leak(text, asked, settings.leak_phrases):
        return Problem("leak", f"… {leak} …")
    anchors = find_anchors(text, settings.anchor_phrases)
    if not anchors and settings.min_anchors > 0:
        return Problem("no_anchors", f"no look at the image, wanted {settings.min_anchors} or more")
    if len(anchors) < settings.min_anchors:
        return Problem("few_anchors", f"{len(anchors)} looks at the image, wanted {settings.min_anchors} or more")
    if len(anchors) > 1 and (spread := anchors[-1].position - anchors[0].position) < settings.min_spread:
        first, last = anchors[0].position, anchors[-1].position
        return Problem(
            "bunched_anchors",
            f"all looks begin between {first:.0%} and {last:.0%} of the chain: {spread:.0%}, wanted "
            f"{settings.min_spread:.0%} or more",
        )
    if context.description and (share := grounded_share(anchors, context.description)) < settings.min_grounded:
        return Problem(
            "ungrounded_anchors",
            f"{share:.0%} of {len(anchors)} looks name something of the description, wanted "
            f"{settings.min_grounded:.0%} or more",
        )
    return _length_problem(text, context.chain, settings.max_length_ratio)


def _length_problem(text: str, chain: str | None, limit: float) -> Problem | None:
    if chain is None:
        return None
    before, after = max(1, len(words(chain))), max(1, len(words(text)))
    if max(before / after, after / before) > limit:
        return Problem("length_ratio", f"{after} words from {before}, at most {limit:g} times as many or as few")
    return None
