"""A model as judge of answers, where it is asked for; without one, rules alone decide.

The judge is named, answers at temperature 0, and sees question, options, right answer and the part of the response
that answers, never the reasoning. Its reply counts only if it is exactly {"right": true} or {"right": false}.
Replies are kept in FOLDER, keyed by all that was sent, so that a rerun asks nothing twice.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from verl_avar.calls.store import Lines, Writer, call_key, writer_name
from verl_avar.errors import ConfigError
from verl_avar.evaluation.benchmark.score import Score, answer_part

PROMPT = Path(__file__).with_name("judge.jinja")
RULES = "rules"
STAGE = "judge"


@dataclass(frozen=True)
class Judge:
    """An OpenAI-compatible endpoint and the model to ask there.

    prompt: jinja file with the blocks `system` and `user`, of `question`, `choices`, `answer` and `given`.
    endpoint: further settings of `calls.endpoint.Endpoint`, as concurrency or requests_per_minute.
    """

    base_url: str
    model: str
    api_key_env: str | None = None
    prompt: Path = PROMPT
    max_tokens: int = 64
    endpoint: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """One response to judge, with the score that rules give it."""

    question: Mapping[str, Any]  # schema.QUESTIONS
    response: str | None
    finish: str
    score: Score


@dataclass(frozen=True)
class Verdict:
    """score: what counts. scored_by: the judge's model, or RULES where it was not asked or can't be believed."""

    score: Score
    scored_by: str


def judge_all(items: Sequence[Item], judge: Judge, folder: Path) -> tuple[list[Verdict], dict]:
    """A verdict for each item, in order, and counts of what the judge did.

    Not asked are items without an answer to show (truncated, empty, failed): rules decide. A reply that is no verdict
    leaves the rules' with the problem judge_unreadable, a call that failed with judge_failed; a rerun makes that call
    again. Counts: asked (requests of this run), stored (replies of earlier ones), judged, unreadable, failed, and of
    the judged `agree`, `only_rules` (right by rules alone) and `only_judge`; `models`, names that replies came under.
    Raises ConfigError for a prompt or settings that are wrong, EndpointError where the endpoint can't be used.
    """
    prompts = [_messages(judge, item) for item in items]
    keys = [None if prompt is None else _key(judge, prompt) for prompt in prompts]
    with Lines(folder) as lines:
        replies = {key: lines.get(key) for key in set(keys) - {None}}
    stored = sum(reply is not None for reply in replies.values())
    wanted = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key and replies[key] is None}
    asked = asyncio.run(_ask(judge, wanted, folder)) if wanted else {}
    replies |= asked
    counts = Counter(dict.fromkeys(("judged", "unreadable", "failed", "agree", "only_rules", "only_judge"), 0))
    verdicts = [
        Verdict(item.score, RULES) if key is None else _verdict(item.score, replies[key], judge, counts)
        for item, key in zip(items, keys, strict=True)
    ]
    models = sorted({reply["model"] for reply in replies.values() if reply})
    return verdicts, {"asked": len(wanted), "stored": stored, **counts, "models": models}


def _verdict(score: Score, reply: Mapping[str, Any] | None, judge: Judge, counts: Counter) -> Verdict:
    right = None if reply is None else read_verdict(reply["text"])
    if right is None:
        kind = "failed" if reply is None else "unreadable"
        counts[kind] += 1
        return Verdict(Score(score.extracted, score.right, f"judge_{kind}"), RULES)
    counts["judged"] += 1
    counts["agree" if right == score.right else "only_judge" if right else "only_rules"] += 1
    return Verdict(Score(score.extracted, right, score.problem), judge.model)


def read_verdict(text: str) -> bool | None:
    """What a reply says; None unless it is {"right": true} or {"right": false}, white space aside."""
    try:
        said = json.loads(text, object_pairs_hook=list)  # as pairs, so that a key given twice is seen
    except ValueError:
        return None
    if isinstance(said, list) and len(said) == 1 and said[0] in (("right", True), ("right", False)):
        return said[0][1] if isinstance(said[0][1], bool) else None
    return None


def _sampling(judge: Judge) -> dict[str, Any]:
    return {"temperature": 0, "max_tokens": judge.max_tokens}


def _key(judge: Judge, messages: list[dict]) -> str:
    return call_key(STAGE, judge.model, messages, _sampling(judge))


def _messages(judge: Judge, item: Item) -> list[dict] | None:
    """What the judge is asked about an item; None where it has no answer to show."""
    part = None if item.response is None else answer_part(item.response, item.finish)
    if part is None or part.text is None:
        return None
    template = _template(judge.prompt)
    context = {name: item.question[name] for name in ("question", "answer")}
    context |= {"choices": list(item.question["choices"]), "given": part.text}
    try:
        blocks = {role: "".join(block(template.new_context(context))) for role, block in template.blocks.items()}
    except jinja2.TemplateError as error:
        raise ConfigError(f"{judge.prompt}: {error}; it may use question, choices, answer and given") from None
    return [{"role": role, "content": blocks[role].strip()} for role in ("system", "user") if blocks.get(role)]


@cache
def _template(path: Path) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    try:
        template = environment.from_string(path.read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(f"judge: no file {path}; name the prompt's") from None
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{path}, line {error.lineno}: {error.message}") from None
    if "user" not in template.blocks:
        raise ConfigError(f"{path}: no block user; write the prompt into {{% block user %}}…{{% endblock %}}")
    return template


async def _ask(judge: Judge, wanted: Mapping[str, list[dict]], folder: Path) -> dict[str, dict | None]:
    """The replies, each written to the folder as it comes; None for a call that failed."""
    from omegaconf import OmegaConf

    from verl_avar.calls.endpoint import CallFailed, Endpoint

    settings = {
        "base_url": judge.base_url, "api_key_env": judge.api_key_env, "concurrency": 16, "requests_per_minute": None,
        "tokens_per_minute": None, "timeout_s": 120.0, "attempts": 8, "backoff_s": 1.0, "backoff_max_s": 60.0,
        "proxy": None,
    }  # fmt: skip
    if unknown := set(judge.endpoint) - set(settings):
        raise ConfigError(f"judge: no setting {', '.join(sorted(unknown))}; there are {', '.join(settings)}")
    endpoint, writer = Endpoint(STAGE, OmegaConf.create(settings | dict(judge.endpoint))), Writer(folder, writer_name())

    async def one(key: str, messages: list[dict]) -> tuple[str, dict | None]:
        try:
            answer = await endpoint.call(STAGE, judge.model, messages, _sampling(judge))
        except CallFailed:
            return key, None
        reply = {"text": answer.text, "finish": answer.finish, "model": answer.model}
        if answer.finish == "bad_request":  # the text is the refusal's, and may pass with other settings
            return key, None
        writer.add(key, reply)
        return key, reply

    tasks = [asyncio.create_task(one(key, messages)) for key, messages in wanted.items()]
    try:
        return dict(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await endpoint.close()
        writer.close()
