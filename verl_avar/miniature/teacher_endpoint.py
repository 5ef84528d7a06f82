"""What the exact teacher's OpenAI-compatible endpoint answers; `teacher_server` runs it.

    POST /v1/chat/completions   models scene-describer, scene-reasoner, scene-anchorer; no streaming, one choice
    GET  /v1/models
    GET  /stats                 what was asked and served until now

The parts of a prompt are found by the tags that the shipped prompts (`verl_avar.synthesis.prompt`) put around them:
<question>, <description>, <reasoning>. Words count as tokens.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from verl_avar.miniature import teacher
from verl_avar.miniature.teacher import CannotAnswer
from verl_avar.miniature.teacher_faults import Bucket, Faults

STAGES = {"scene-describer": "describe", "scene-reasoner": "reason", "scene-anchorer": "anchor"}
DESCRIPTION = "exact teacher of the miniature's scenes, not a language model"
_TAGS = {tag: re.compile(rf"<{tag}>\s*(.*?)\s*</{tag}>", re.DOTALL) for tag in ("question", "description", "reasoning")}


@dataclass(frozen=True)
class Settings:
    faults: Faults = field(default_factory=Faults)
    seed: int = 0  # of the transport faults
    requests_per_minute: float | None = None
    latency_s: float = 0.0  # of every answer
    hold_s: float = 30.0  # how long a timeout lasts
    slow_s: float = 2.0
    api_key: str | None = None


class Cut(JSONResponse):
    """Half of its body; the server closes the connection of a response that does not keep its content-length."""

    async def __call__(self, scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body[: len(self.body) // 2], "more_body": True})


class Endpoint:
    """The requests' handlers and what they counted."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self._rng = random.Random(settings.seed)
        limit = settings.requests_per_minute
        self._bucket = None if limit is None else Bucket(limit)
        self._responses, self._texts = Counter(), Counter()
        self._requests, self._with_images = Counter(), Counter()
        self._first = self._last = None

    def app(self) -> Starlette:
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/stats", self.stats),
        ]
        return Starlette(routes=routes)

    async def models(self, request: Request) -> Response:
        if refused := self._unauthorized(request):
            return refused
        owner = {"object": "model", "created": 0, "owned_by": "verl_avar", "description": DESCRIPTION}
        return JSONResponse({"object": "list", "data": [{"id": name, **owner} for name in STAGES]})

    async def stats(self, request: Request) -> Response:
        """responses: one kind per request (ok, limited: above the stated rate, bad_request, unauthorized, or the
        fault); texts: of ok and slow responses, by content (exact or the fault); requests: readable ones by stage;
        with_images: those of them that carried images, by model; first, last: time of a request, seconds since 1970."""
        counts = {
            "responses": self._responses,
            "texts": self._texts,
            "requests": self._requests,
            "with_images": self._with_images,
        }
        return JSONResponse({**counts, "first": self._first, "last": self._last})

    async def chat(self, request: Request) -> Response:
        self._last = time.time()
        self._first = self._first or self._last
        if refused := self._unauthorized(request):
            self._responses["unauthorized"] += 1
            return refused
        try:
            asked = read_request(await request.body())
        except CannotAnswer as error:
            return self._bad_request(error)
        self._requests[STAGES[asked.model]] += 1
        self._with_images[asked.model] += bool(asked.images)

        wait = self._bucket.take(time.monotonic()) if self._bucket else 0.0
        if wait:
            return self._too_many("limited", wait)
        fault = self.settings.faults.transport(self._rng)
        if fault == "rate_limit":
            return self._too_many(fault, 1.0)
        if fault == "server_error":
            return self._error(500, "the server had an error (a fault that was asked for)", fault)
        if fault == "timeout":
            response = self._error(504, "no answer in time (a fault that was asked for)", fault)
            await asyncio.sleep(self.settings.hold_s)
            return response
        if pause := self.settings.latency_s + (self.settings.slow_s if fault == "slow" else 0.0):
            await asyncio.sleep(pause)
        try:
            text, kind = answer(asked, self.settings.faults)
        except CannotAnswer as error:
            return self._bad_request(error)
        body = completion(asked, text, number=self._responses.total())
        self._responses[fault or "ok"] += 1
        if fault == "cut":
            return Cut(body, headers=self._headers())
        if fault == "malformed":
            whole = json.dumps(body)
            return Response(whole[: len(whole) * 2 // 3], media_type="application/json", headers=self._headers())
        self._texts[kind] += 1
        return JSONResponse(body, headers=self._headers())

    def _unauthorized(self, request: Request) -> Response | None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.settings.api_key in (None, given):
            return None
        # Some servers echo the key: a client must not let it through into its logs.
        error = {"message": f"Incorrect API key provided: {given}", "type": "invalid_request_error"}
        return JSONResponse({"error": error | {"code": "invalid_api_key"}}, 401)

    def _too_many(self, kind: str, wait: float) -> Response:
        response = self._error(429, "too many requests", kind)
        response.headers["retry-after"] = str(math.ceil(wait))
        response.headers["retry-after-ms"] = str(math.ceil(1000 * wait))
        return response

    def _bad_request(self, error: CannotAnswer) -> Response:
        return self._error(400, str(error), "bad_request")

    def _error(self, status: int, message: str, kind: str) -> Response:
        self._responses[kind] += 1
        return JSONResponse({"error": {"message": message, "type": kind}}, status, headers=self._headers())

    def _headers(self) -> dict[str, str]:
        if self._bucket is None:
            return {}
        return {
            "x-ratelimit-limit-requests": f"{self.settings.requests_per_minute:g}",
            "x-ratelimit-remaining-requests": str(int(self._bucket.tokens)),
        }


@dataclass(frozen=True)
class Asked:
    """A request that can be read."""

    model: str
    prompt: str  # text of all messages
    images: Sequence[bytes]
    max_tokens: int | None
    digest: str  # of the model, the messages and the seed


def read_request(body: bytes) -> Asked:
    """Raises CannotAnswer for what is not a chat completion request that the endpoint knows."""
    try:
        given = json.loads(body)
        model, messages = given["model"], given["messages"]
        contents = [message["content"] for message in messages]
        parts = [part for content in contents for part in _parts(content)]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        prompt = "\n".join(texts)
        max_tokens = given.get("max_completion_tokens") or given.get("max_tokens")
        max_tokens = None if max_tokens is None else int(max_tokens)
        images = [base64.b64decode(url.partition(";base64,")[2], validate=True) for url in urls]
    except (KeyError, TypeError, ValueError) as error:
        raise CannotAnswer(f"not a chat completion request: {type(error).__name__}: {error}") from None
    if model not in STAGES:
        raise CannotAnswer(f"no model '{model}'; models are {', '.join(STAGES)}")
    if given.get("stream") or given.get("n") not in (None, 1):
        raise CannotAnswer("neither stream nor n is supported: one whole choice a request")
    if not all(images):
        raise CannotAnswer("an image is no data URI (data:image/png;base64,…): nothing is fetched")
    digest = hashlib.sha256(json.dumps([model, messages, given.get("seed")], sort_keys=True).encode()).hexdigest()
    return Asked(model, prompt, images, max_tokens, digest)


def _parts(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def answer(asked: Asked, faults: Faults) -> tuple[str, str]:
    """The text, and what it is: "exact" or the kind of its fault. Always the same for the same request."""
    stage, rng = STAGES[asked.model], random.Random(asked.digest)
    fault = faults.content(stage, rng)
    if stage == "describe":
        if len(asked.images) != 1:
            raise CannotAnswer(f"{asked.model} describes one image; the request has {len(asked.images)}")
        text = teacher.describe(teacher.read_scene(asked.images[0]))
    elif stage == "reason":
        mistake = rng if fault == "wrong_answer" else None
        text = teacher.reason(_tagged(asked, "description"), _tagged(asked, "question"), mistake)
    else:
        text = teacher.anchor(_tagged(asked, "reasoning"), rng if fault == "leak" else None)
    return (rng.choice(teacher.REFUSALS) if fault == "refusal" else text), fault or "exact"


def _tagged(asked: Asked, tag: str) -> str:
    if not (match := _TAGS[tag].search(asked.prompt)):
        raise CannotAnswer(f"{asked.model} looks for <{tag}>…</{tag}> in the prompt, as the shipped prompts have it")
    return match[1]


def completion(asked: Asked, text: str, number: int) -> dict[str, Any]:
    """The response's body, the text cut after the request's max_tokens."""
    words = text.split()
    cut = asked.max_tokens is not None and len(words) > asked.max_tokens
    if cut:
        words = words[: asked.max_tokens]
        text = " ".join(words)
    prompt = len(asked.prompt.split())
    usage = {"prompt_tokens": prompt, "completion_tokens": len(words), "total_tokens": prompt + len(words)}
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "length" if cut else "stop", "logprobs": None}
    created = {"id": f"chatcmpl-{number}", "object": "chat.completion", "created": int(time.time())}
    return {**created, "model": asked.model, "choices": [choice], "usage": usage}
