"""Conversations in ShareGPT layout: {from, value} or {role, content}."""

from __future__ import annotations

from typing import Any

from verl_avar.errors import ConfigError

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def turns(value: Any, where: str) -> list[dict[str, str]]:
    """Messages {role, content} of a ShareGPT conversation: system or not, then user and assistant in turn.

    Raises ConfigError for anything else.
    """
    messages = []
    for message in value or ():
        keys = ("role", "content") if "role" in message else ("from", "value")
        role, content = (message.get(key) for key in keys)
        if role not in ROLES or not isinstance(content, str):
            raise ConfigError(
                f"{where}: a message must be {{role, content}} or {{from, value}} with text, its role one of "
                f"{', '.join(ROLES)}; this one has {', '.join(f'{k}={str(v)[:40]!r}' for k, v in message.items())}"
            )
        messages.append({"role": ROLES[role], "content": content})
    speakers = [message["role"] for message in messages]
    said = speakers[1:] if speakers[:1] == ["system"] else speakers
    if not said or said != ["user", "assistant"] * (len(said) // 2):
        raise ConfigError(f"{where}: user and assistant must take turns, the assistant last; it has {speakers}")
    return messages
