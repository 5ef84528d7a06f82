"""What a model wrote, read from a chat completion that may hold anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BAD_REQUEST = "bad_request"


@dataclass(frozen=True)
class Answer:
    """What a model wrote. finish: the API's finish_reason, or bad_request where the endpoint refused the request."""

    text: str
    finish: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    attention: dict | None = None  # scores of the response, from a server with the visual-attention connector


def read(reply: Any, model: str, reasoning: bool, seconds: float) -> Answer | None:
    """None for what is not a chat completion: the client's objects hold whatever the server sent."""
    choices = getattr(reply, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = getattr(choice, "message", None)
    text = _text(getattr(message, "content", False))
    if text is None:
        return None
    finish = choice.finish_reason if isinstance(choice.finish_reason, str) else "unknown"
    if not text and isinstance(refusal := getattr(message, "refusal", None), str):
        text, finish = refusal, "content_filter"
    thought = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    if reasoning and isinstance(thought, str) and thought.strip() and "<think>" not in text:
        text = f"<think>{thought.strip()}</think>{text}"
    usage = getattr(reply, "usage", None)
    counts = (getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens"))
    name = reply.model if isinstance(reply.model, str) else model
    tokens = (count if isinstance(count, int) else 0 for count in counts)
    return Answer(utf8(text), finish, utf8(name), *tokens, seconds, _attention(reply))


def _attention(reply: Any) -> dict | None:
    """`kv_transfer_params.visual_attention` of an answer (verl_avar/rollout/SERVING.md)."""
    extra = getattr(reply, "model_extra", None)
    transferred = extra.get("kv_transfer_params") if isinstance(extra, dict) else None
    attention = transferred.get("visual_attention") if isinstance(transferred, dict) else None
    return attention if isinstance(attention, dict) else None


def _text(content: Any) -> str | None:
    """Of a message: a text, nothing, or parts of which some are texts. None for anything else."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        return None
    texts = [part.get("text") if isinstance(part, dict) else getattr(part, "text", None) for part in content]
    return "".join(text for text in texts if isinstance(text, str))


def utf8(text: str) -> str:
    """JSON may hold halves of surrogate pairs, which no file can."""
    return text.encode("utf-8", "replace").decode()
