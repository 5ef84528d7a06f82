"""What a model is asked: a question and its options under a stated protocol.

A protocol is data: a system prompt and, for each answer type, the words of the user's turn. `README.md` states each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from verl_avar.data.choices import option_lines
from verl_avar.data.images import data_uri
from verl_avar.data.schema import IMAGE, SYSTEM
from verl_avar.errors import ConfigError

LISTED = "list"  # MathVista's answer_type of answers such as [1, 2]


@dataclass(frozen=True)
class Protocol:
    """`user`: answer type -> text with {question}, {options} (lines "A. …"), {how} (the words for the answer); for
    texts with the images before all else {images}, and {text}, the question without them.
    """

    name: str
    system: str | None
    user: Mapping[str, str]
    how: Mapping[str, str] = field(default_factory=dict)
    by_benchmark: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # benchmark, or benchmark/part
    as_published: bool = False  # meta's `asked` is the whole text where a copy has it
    own_turns: bool = False  # meta's `turns`, the row's own, go before the question


_WITH_OPTIONS = "{question}\n{options}\n{how}"
_WITHOUT = "{question}\n{how}"
_USER = {
    kind: _WITH_OPTIONS if kind == "choice" else _WITHOUT for kind in ("choice", "number", "latex", "text", "yes_no")
}
_PLAIN = {kind: "{question}" for kind in _USER}

THINK = Protocol(
    "think",
    SYSTEM,
    _USER,
    {
        "choice": "Answer with the option's letter.",
        "number": "Answer with a number.",
        "integer": "Answer with a whole number.",
        "decimal": "Answer with a number to {places}.",
        "latex": "Answer with the value or expression.",
        "text": "Answer with a word, a number or a short phrase.",
        "list": "Answer with a list, such as [1, 2, 3].",
        "yes_no": "Answer with yes or no.",
    },
)
DIRECT = Protocol("direct", None, _USER, {kind: f"{how[:-1]} and nothing else." for kind, how in THINK.how.items()})
# Of VLMEvalKit e8e78f0, vlmeval/dataset: image_mcq.py (options, MMMU-Pro), image_base.py and image_yorn.py (the rest).
HARNESS = Protocol(
    "harness",
    None,
    _PLAIN
    | {
        "choice": "{images}Question: {text}\nOptions:\n{options}\n"
        "Please select the correct answer from the options above. \n"
    },
    by_benchmark={
        "mmmu_val": {
            "choice": "Question: {question}\nOptions:\n{options}\n"
            "Please select the correct answer from the options above. \n",
            "text": "Question: {question}\n",
        },
        "mmmu_pro/vision": {
            "choice": "{images}Answer the following multiple-choice question in the image. "
            "Answer directly with the option letter from the given choices. "
        },
        "mmmu_pro": {
            "choice": "Question: {question}\nOptions:\n{options}\n"
            "Answer directly with the option letter from the given choices. "
        },
    },
    as_published=True,
)
# Rows of a training's own form: their system turn and words, as training asks them.
OWN = Protocol("own", None, _PLAIN, own_turns=True)


@cache
def protocol(name: str) -> Protocol:
    """The protocol of a name. Raises ConfigError for an unknown one."""
    known = {each.name: each for each in (THINK, DIRECT, HARNESS, OWN)}
    names = (THINK.name, DIRECT.name, HARNESS.name, "miniature", OWN.name)
    if name == "miniature":
        from verl_avar.miniature.tasks import SYSTEM as MINIATURE

        return Protocol("miniature", MINIATURE, _PLAIN)
    if name not in known:
        raise ConfigError(f"no protocol '{name}'; there are {', '.join(names)}")
    return known[name]


def messages(question: Mapping[str, Any], how: Protocol | str = THINK) -> list[dict[str, Any]]:
    """A row of schema.QUESTIONS as OpenAI's API takes it: the user's content in parts, images as data URIs in place.

    Neighbouring texts are one part, empty ones are left out. Raises ConfigError where the text has another number of
    <image> than the row has images.
    """
    *before, user = text_messages(question, how)
    pieces = user["content"].split(IMAGE)
    if len(pieces) - 1 != len(question["images"]):
        raise ConfigError(
            f"{question['benchmark']} {question['id']}: {len(pieces) - 1} {IMAGE} in the text, "
            f"{len(question['images'])} images"
        )
    content = []
    for number, piece in enumerate(pieces):
        if number:
            uri = data_uri(question["images"][number - 1]["bytes"])
            content.append({"type": "image_url", "image_url": {"url": uri}})
        if piece:
            content.append({"type": "text", "text": piece})
    return [*before, {"role": "user", "content": content}]


def text_messages(question: Mapping[str, Any], how: Protocol | str = THINK) -> list[dict[str, str]]:
    """The same with texts as content, <image> where an image goes: what is hashed, stored and shown."""
    how = protocol(how) if isinstance(how, str) else how
    before = [] if how.system is None else [{"role": "system", "content": how.system}]
    if how.own_turns:
        before = json.loads(question["meta"]).get("turns", [])
    return [*before, {"role": "user", "content": _user(question, how)}]


def _user(question: Mapping[str, Any], how: Protocol) -> str:
    meta = json.loads(question["meta"])
    if how.as_published and "asked" in meta:
        return IMAGE * len(question["images"]) + meta["asked"]
    options = [] if meta.get("options_in_image") else list(question["choices"])
    kind = question["answer_type"]
    places = (f"{question['benchmark']}/{meta.get('part')}", question["benchmark"])
    own = next((how.by_benchmark[place] for place in places if place in how.by_benchmark), {})
    template = own.get(kind, how.user[kind])
    if not options:  # drawn in the image, or in the question already
        template = template.replace("\nOptions:\n{options}", "").replace("\n{options}", "")
    parts = {
        "question": question["question"],
        "options": option_lines(options),
        "how": _how(kind, meta, how),
        "images": IMAGE * len(question["images"]),
        "text": question["question"].replace(IMAGE, ""),
    }
    return re.sub(r"\{(question|options|how|images|text)\}", lambda found: parts[found[1]], template)


def _how(kind: str, meta: Mapping[str, Any], how: Protocol) -> str:
    """The words for the answer; MathVista's say more than the type."""
    said = meta.get("answer_type")
    if kind == "number" and said == "integer":
        return how.how.get("integer", "")
    if kind == "number" and said == "float" and meta.get("precision") is not None:
        places = int(float(meta["precision"]))
        words = f"{places} decimal place" if places == 1 else f"{places} decimal places"
        return how.how.get("decimal", "").replace("{places}", words)
    return how.how.get(LISTED if kind == "text" and said == LISTED else kind, "")
