"""Prompts for tests of roles: a processor with as little in it as roles need, and templates in a few words.

Letters: `s` system, `v` visual, `u` user, `.` other. Special tokens are in brackets; `[img]` stands for an image.
"""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
from families import tokenizers

from verl_avar.roles import Role
from verl_avar.template import ChatTemplate

LETTER = {Role.OTHER: ".", Role.SYSTEM: "s", Role.VISUAL: "v", Role.USER: "u"}
SPECIALS = ("[bos]", "[turn]", "[end]", "[img]", "[soft]", "[video]", "[a]", "[b]")


def template(turn: str, start: str = "", prompt: str = "[turn]assistant:") -> str:
    """A template: `start`, then `turn` for each message (`role` and `text` are at hand), then the generation prompt."""
    return (
        start + "{%- for message in messages %}{%- set role = message['role'] %}{%- set text %}"
        "{%- for part in message['content'] %}"
        "{{- {'image': '[img]', 'text': part['text']}[part['type']] }}"
        "{%- endfor %}{%- endset %}"
        + turn
        + "{%- endfor %}{%- if add_generation_prompt %}{{- '"
        + prompt
        + "' }}{%- endif %}"
    )


PLAIN = template("{{- '[turn]' + role + ':' + text + '[end]' }}")


class Processor:
    """As little of a processor as roles need."""

    def __init__(self, chat_template: str | None = PLAIN, tokenizer=None):
        self.chat_template = chat_template
        self.tokenizer = tokenizers.byte_level(SPECIALS, bos_token="[bos]") if tokenizer is None else tokenizer

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, tokenize=tokenize, add_generation_prompt=add_generation_prompt
        )


def chat_template(*args, visual: str = "[img]", **kwargs) -> ChatTemplate:
    processor = Processor(*args, **kwargs)
    return ChatTemplate.of(processor, SimpleNamespace(image_token_id=processor.tokenizer.convert_tokens_to_ids(visual)))


def turn(role: str, *parts: str) -> dict:
    """A message; the part "image" or "video" is one."""
    return {
        "role": role,
        "content": [{"type": p} if p in ("image", "video") else {"type": "text", "text": p} for p in parts],
    }


SYSTEM, QUESTION, ANSWER = (
    turn("system", "Look closely."),
    turn("user", "image", "What is it?"),
    turn("assistant", "A 12."),
)


def spans(chat: ChatTemplate, messages: list[dict], expansion: str = "[img][img]", **options) -> list[str]:
    """What each stretch of one role spells, after its letter; the placeholders are expanded first."""
    tokenizer = chat._renderer.tokenizer
    ids = tokenizer(chat.render(messages).replace("[img]", expansion), **options)["input_ids"]
    roles = chat.roles(messages, ids)
    assert roles.dtype == np.uint8 and roles.shape == (len(ids),)
    cuts = [0, *(np.flatnonzero(np.diff(roles)) + 1).tolist(), len(ids)]
    return [LETTER[Role(roles[a])] + tokenizer.decode(ids[a:b]) for a, b in pairwise(cuts)]
