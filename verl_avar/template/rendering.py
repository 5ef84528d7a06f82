"""Renders conversations with a processor's chat template so that each text and image can be found in the result."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError

_MARK = 0xF0000  # private-use characters, two for each text
_MARKS = re.compile("[\U000f0000-\U000ffffd]")
_ROLES = ("system", "user", "assistant", "tool")
_VISUAL_KEYS = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
_REFUSALS = (TemplateError, TypeError)  # what a template raises by itself, and where it expects a string or a list


def message(role: str, text: str) -> dict:
    """A message of one text part."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def read_messages(messages: Sequence[dict]) -> list[dict]:
    """Messages with their content as parts, checked; raises ValueError naming the message."""
    read: list[dict] = []
    for m, each in enumerate(messages):
        role, content = each.get("role"), each.get("content")
        where = f"template: message {m} ({role})"
        if role not in _ROLES:
            raise ValueError(f"{where}: unknown role; known are {', '.join(_ROLES)}")
        if role == "system" and any(earlier["role"] != "system" for earlier in read):
            raise ValueError(f"{where}: a system message after another's")
        content = [{"type": "text", "text": content}] if isinstance(content, str) else [dict(part) for part in content]
        for part in content:
            if part.get("type") not in ("text", "image", "video"):
                raise ValueError(f"{where}: a part of type {part.get('type')!r}; known are text, image, video")
            if part["type"] == "text" and (strange := _MARKS.search(part["text"])):
                raise ValueError(f"{where}: private-use character U+{ord(strange[0]):X} in its text")
        read.append({**each, "content": content})
    if next((each["role"] for each in read if each["role"] != "system"), None) != "user":
        raise ValueError("template: a conversation needs a user message, first or right after the system message")
    return read


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation and where its contents lie in it, in characters."""

    text: str
    items: list[list[tuple[int, int]]]  # of each message: the spans of its texts and placeholders, in order
    holes: list[tuple[int, int]]  # all placeholders, in order


class Renderer:
    """A processor's chat template: the form in which it takes content, and what it writes for an image."""

    def __init__(self, processor: Any, config: Any):
        """Raises ValueError where the processor's prompts can't be followed; see `ChatTemplate.of`."""
        self.processor, self.name = processor, type(processor).__name__
        self.tokenizer = getattr(processor, "tokenizer", processor)
        if not getattr(processor, "chat_template", None):
            raise ValueError(f"template: {self.name} has no chat template: {self._remedy()}")
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                f"template: {type(self.tokenizer).__name__} is a slow tokenizer, without the character offsets that "
                "roles are found by; the checkpoint needs a tokenizer.json"
            )
        # SmolVLM's own method logs a warning on every call that brings none of these.
        takes = inspect.signature(processor.apply_chat_template).parameters
        self._options = {"processor_kwargs": {"padding": False}} if "processor_kwargs" in takes else {}
        self.visual = self._visual_ids(config)
        added = self.tokenizer.added_tokens_decoder
        self.special = {i for i, token in added.items() if token.special} | set(self.tokenizer.all_special_ids)
        self._strings: set[str] = set()  # roles whose content the template takes as a string only
        # In an order in which each role is tried among such that are settled.
        self._refused = {
            role: why for role in ("user", "assistant", "system", "tool") if (why := self._choose_form(role))
        }
        for role in ("user", "assistant"):
            if role in self._refused:
                raise ValueError(f"template: {self.name}'s chat template {self._refused[role]}")
        self._placeholders = {kind: self._placeholder(kind) for kind in ("image", "video")}
        if self._placeholders["image"] is None:
            raise ValueError(f"template: {self.name}'s chat template writes no token of its own for an image")
        ours = [self.token(i) for i in self.visual] + list(self._placeholders.values())
        self._reserved = list(dict.fromkeys(token for token in ours if token))

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def token(self, i: int) -> str | None:
        return self.tokenizer.convert_ids_to_tokens(i)

    def text(self, messages: Sequence[dict], generation: bool) -> str:
        """The rendered conversation. Raises ValueError where the template refuses or drops a message's role."""
        for each in messages:
            if why := self._refused.get(each["role"]):
                raise ValueError(f"template: {self.name}'s chat template {why}")
        try:
            return self._write(messages, generation)
        except _REFUSALS as error:
            roles = ", ".join(each["role"] for each in messages)
            raise ValueError(
                f"template: {self.name}'s chat template refuses a conversation of {roles}: {error}"
            ) from error

    def marked(self, messages: Sequence[dict], generation: bool) -> Rendered:
        """Renders with a mark at each end of each text, inside its outer white space, which templates may trim."""
        names = [f"message {m} ({each['role']})" for m, each in enumerate(messages)]
        copies, texts, visuals = [], [], {}
        for m, each in enumerate(messages):
            content = []
            for part in each["content"]:
                if part["type"] == "text":
                    part = part | {"text": self._mark(part["text"], len(texts), names[m])}
                    texts += [m] * (part["text"].strip() != "")
                else:
                    if self._placeholders[part["type"]] is None:
                        raise ValueError(f"template: {self.name}'s chat template writes no token for a {part['type']}")
                    visuals.setdefault(self._placeholders[part["type"]], []).append(m)
                content.append(part)
            copies.append(each | {"content": content})
        written = self.text(copies, generation)
        pieces, marks = _MARKS.split(written), [ord(mark) - _MARK for mark in _MARKS.findall(written)]
        at = dict(zip(marks, np.cumsum([len(piece) for piece in pieces]).tolist(), strict=False))
        text = "".join(pieces)
        items: list[list[tuple[int, int]]] = [[] for _ in messages]
        for n, m in enumerate(texts):
            opened, closed = marks.count(2 * n), marks.count(2 * n + 1)
            # The thoughts that open an assistant's earlier text are left out by some templates.
            if closed != 1 or opened > 1 or (not opened and messages[m]["role"] != "assistant"):
                raise ValueError(f"template: {self.name}'s chat template drops or repeats a text of {names[m]}")
            items[m].append((at[2 * n if opened else 2 * n + 1], at[2 * n + 1]))
        holes = []
        for token, owners in visuals.items():
            spans = [match.span() for match in re.finditer(re.escape(token), text)]
            if len(spans) != len(owners):
                raise ValueError(f"template: {len(owners)} images or videos, but {len(spans)} {token!r} in the prompt")
            for m, span in zip(owners, spans, strict=True):
                items[m].append(span)
            holes += spans
        reached = 0
        for name, spans in zip(names, items, strict=True):
            spans.sort()
            if not spans:
                raise ValueError(f"template: {name} holds neither text nor image")
            if spans[0][0] < reached:
                raise ValueError(f"template: {self.name}'s chat template moves {name} out of its order")
            reached = spans[-1][1]
        return Rendered(text, items, sorted(holes))

    def _mark(self, text: str, n: int, name: str) -> str:
        """A text with marks 2n and 2n + 1 around its words; unchanged where it has none."""
        for token in self._reserved:
            if token in text:
                raise ValueError(f"template: {name} has {token!r} in its text, which stands for an image or video")
        words = text.strip()
        if not words:
            return text
        before, after = text.split(words, 1)
        return f"{before}{chr(_MARK + 2 * n)}{words}{chr(_MARK + 2 * n + 1)}{after}"

    def _write(self, messages: Sequence[dict], generation: bool) -> str:
        """The template's text; raises what the template raises."""
        taken = [
            each | {"content": self._joined(each)} if each["role"] in self._strings else dict(each) for each in messages
        ]
        return self.processor.apply_chat_template(
            taken, tokenize=False, add_generation_prompt=generation, **self._options
        )

    def _joined(self, each: dict) -> str:
        """Content as one string, for templates that take no parts: the processor's own token where an image goes."""
        pieces = []
        for part in each["content"]:
            piece = part["text"] if part["type"] == "text" else getattr(self.processor, f"{part['type']}_token", None)
            if piece is None:
                raise TypeError(f"it takes strings only, and {self.name} names no {part['type']}_token to write there")
            pieces.append(piece)
        return "".join(pieces)

    def _remedy(self) -> str:
        if self.tokenizer is not self.processor and getattr(self.tokenizer, "chat_template", None):
            return "its tokenizer has one; set processor.chat_template = processor.tokenizer.chat_template"
        return "a base model? Use an instruction-tuned checkpoint, or set processor.chat_template"

    def _visual_ids(self, config: Any) -> tuple[int, ...]:
        """The config's placeholder ids; the first is one that the tokenizer reads as one token."""
        ids = dict.fromkeys(i for key in _VISUAL_KEYS if isinstance(i := getattr(config, key, None), int))
        if not ids:
            raise ValueError(
                f"template: {type(config).__name__} has none of {', '.join(_VISUAL_KEYS)}; pass the config of the "
                "whole vision-language model"
            )
        known = [i for i in ids if i >= 0 and (token := self.token(i)) is not None and self.ids(token) == [i]]
        if not known:
            raise ValueError(
                f"template: the placeholder ids {list(ids)} of {type(config).__name__} are no tokens of {self.name}'s "
                "tokenizer; are both from the same checkpoint?"
            )
        return tuple(dict.fromkeys([*known, *ids]))

    def _choose_form(self, role: str) -> str | None:
        """Parts if the template takes them in messages of this role, else strings; else returns why neither."""
        question, answer, probe = message("user", "x"), message("assistant", "y"), message(role, chr(_MARK))
        conversation = {
            "system": [probe, question],
            "user": [probe],
            "assistant": [question, probe],
            "tool": [question, answer, probe],
        }[role]
        reasons = []
        for strings in (set(), {role}):
            before, self._strings = self._strings, self._strings | strings
            try:
                text = self._write(conversation, generation=False)
            except _REFUSALS as error:
                reasons.append(f"refuses {role} messages ({error})")
            else:
                # A template made for strings prints a list of parts as Python or JSON does.
                if text.count(chr(_MARK)) == 1 and not re.search(r"""["']type["'] *:""", text):
                    return None
                reasons.append(f"doesn't write the text of {role} messages, or not once")
            self._strings = before
        return ", and with content as a string ".join(dict.fromkeys(reasons))

    def _placeholder(self, kind: str) -> str | None:
        """The token that the template writes for an image or video and that the processor expands."""
        text = {"type": "text", "text": "x"}
        try:
            with_it, without = (
                Counter(self.ids(self._write([{"role": "user", "content": content}], generation=False)))
                for content in ([{"type": kind}, text], [text])
            )
        except _REFUSALS:
            return None
        new = list(with_it - without)
        for choice in ([i for i in new if i in self.visual], [i for i in new if i in self.special]):
            if len(choice) == 1:
                return self.token(choice[0])
        named = getattr(self.processor, f"{kind}_token", None)
        return named if named in [self.token(i) for i in new] else None
