"""What the proxy says to a harness, and reads of a server, in the words of OpenAI's API."""

from __future__ import annotations

import json
import time


def completion(model: str, content: str, record: dict):
    """A chat completion as a harness reads it."""
    from starlette.responses import JSONResponse

    prompt, written = record["prompt_tokens"] or 0, record["completion_tokens"] or 0
    return JSONResponse(
        {
            "id": "chatcmpl-kept",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model,
            "choices": [
                # "stop": an answer that was cut off is told by its content, and a harness must not ask again.
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
            ],
            "usage": {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written},
        }
    )


def error(status: int, message: str):
    """An error as OpenAI's clients read it."""
    from starlette.responses import JSONResponse

    return JSONResponse({"error": {"message": message, "type": "proxy", "code": status}}, status_code=status)


def said(text: str) -> str:
    """The message of an OpenAI error, else the text; at most 500 characters."""
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    for name in ("error", "message"):
        value = value.get(name, value) if isinstance(value, dict) else value
    return str(value)[:500]
