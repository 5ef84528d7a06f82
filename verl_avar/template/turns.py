"""Who is who in a rendered conversation (AVAR §2, arXiv:2603.03825).

No family's markers are known here. What a template writes after a message's last content, where nothing follows, is the
end of that turn; what it writes between an assistant's turn and a user's first content is the user's header.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import numpy as np

from verl_avar.roles import Role
from verl_avar.template.expansion import expanded_roles
from verl_avar.template.rendering import Rendered, Renderer, message, read_messages

_TURNS = {"system": Role.SYSTEM, "user": Role.USER, "tool": Role.USER, "assistant": Role.OTHER}


class ChatTemplate:
    """Roles of a processor's prompts, for whatever chat template it has.

    - SYSTEM: from the first token up to the first user turn, whether the caller wrote it or the template. Where the
      template puts the system text into the first user turn (Gemma 3), all before the user's own content. A begin token
      belongs to it; without a system turn no token is SYSTEM, and a begin token alone is OTHER.
    - USER: the user's and tools' turns with their headers and end markers, markers of an image's expansion included.
    - VISUAL: the ids that carry image or video embeddings.
    - OTHER: earlier assistant turns, and the header that asks for the response. What is measured is the response to
      come, so no token of a prompt is RESPONSE.

    visual: the placeholder ids. end_of_turn: the ids of the special tokens that the template writes right after an
    assistant's text, in order; empty where it writes none.
    """

    visual: frozenset[int]
    end_of_turn: tuple[int, ...]

    @classmethod
    def of(cls, processor: Any, config: Any) -> ChatTemplate:
        """Reads a processor's chat template, and the placeholder ids of the model's (top-level) config.

        Raises ValueError where there is no chat template, no fast tokenizer or no placeholder id, or where the template
        doesn't write the text or the image of a message.
        """
        return cls(Renderer(processor, config))

    def __init__(self, renderer: Renderer):
        self._renderer = renderer
        self.visual = frozenset(renderer.visual)
        question, answer = message("user", "x"), message("assistant", "y")
        self._assistant_end = self._end([question, answer])
        self._first_user_turn(renderer.marked([question], generation=True), question, systems=0)
        end = renderer.ids(self._assistant_end.lstrip())
        self.end_of_turn = tuple(takewhile(renderer.special.__contains__, end))

    def render(self, messages: Sequence[dict]) -> str:
        """The prompt's text with the generation prompt, one placeholder per image or video.

        messages: content-part lists, {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "…"}]};
        a plain string counts as one text. Raises ValueError where the template refuses or drops one of their roles.
        """
        return self._renderer.text(read_messages(messages), generation=True)

    def roles(self, messages: Sequence[dict], ids: Any) -> np.ndarray:
        """Roles of a prompt's processed ids.

        messages: as for `render`. ids: [P], what the processor made of `render(messages)` and the images, unpadded.
        Returns uint8 [P] of `Role` values. Raises ValueError, saying where, if the ids are not this prompt's, if a text
        contains a placeholder, or if a boundary can't be told.
        """
        rendered, chars = self._characters(read_messages(messages))
        renderer = self._renderer
        return expanded_roles(
            rendered.text, rendered.holes, chars, np.asarray(ids), renderer.tokenizer, renderer.visual
        )

    def _characters(self, messages: list[dict]) -> tuple[Rendered, np.ndarray]:
        """The rendered prompt and the role of each of its characters, uint8."""
        rendered = self._renderer.marked(messages, generation=True)
        text, items = rendered.text, rendered.items
        if text != self._renderer.text(messages, generation=True):
            raise ValueError("template: the chat template rewrites a text of these messages, so it can't be followed")
        first = next(m for m, each in enumerate(messages) if each["role"] != "system")
        start = self._first_user_turn(rendered, messages[first], systems=first)
        # Special tokens alone, a begin token or two, are no system turn.
        written = first > 0 or not self._renderer.special.issuperset(self._renderer.ids(text[:start].strip()))
        chars = np.full(len(text), Role.SYSTEM if written else Role.OTHER, dtype=np.uint8)
        for m in range(first, len(messages)):
            chars[start:] = _TURNS[messages[m]["role"]]
            start = items[m][-1][1]
            end = self._end(messages[: m + 1])
            if not text.startswith(end, start):
                raise ValueError(
                    f"template: can't tell where message {m} ({messages[m]['role']}) ends: "
                    f"{text[start : start + len(end)]!r} follows it here, {end!r} at the end of a conversation"
                )
            start += len(end)
        chars[start:] = Role.OTHER
        return rendered, chars

    def _end(self, messages: list[dict]) -> str:
        """What the template writes after the last content of the last message: the end of its turn."""
        rendered = self._renderer.marked(messages, generation=False)
        return rendered.text[rendered.items[-1][-1][1] :]

    def _first_user_turn(self, rendered: Rendered, user: dict, systems: int) -> int:
        """Position in the text at which the first user turn starts."""
        content = rendered.items[systems][0][0]
        before = rendered.text[:content]
        header = self._header(user)
        # The same words may be parted from an earlier turn by white space that nothing needs at the start.
        for opening in (header, header.lstrip()):
            if before.endswith(opening):
                return content - len(opening)
        if header.strip() in (before[: rendered.items[0][0][0]] if systems else before):
            return content  # a system text, the caller's or the template's, stands in the user's turn
        raise ValueError(
            f"template: can't tell where the first user turn starts: its content follows {before!r}, "
            f"that of later ones {header!r}"
        )

    def _header(self, user: dict) -> str:
        """What opens a user turn that is not the first, up to its first content."""
        rendered = self._renderer.marked([message("user", "x"), message("assistant", "y"), user], generation=True)
        between = rendered.text[rendered.items[1][-1][1] : rendered.items[2][0][0]]
        if not between.startswith(self._assistant_end):
            raise ValueError(
                f"template: can't tell where a user turn starts: {between!r} follows an assistant's text there, "
                f"{self._assistant_end!r} at the end of a conversation"
            )
        return between[len(self._assistant_end) :]
