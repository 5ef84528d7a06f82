"""One OpenAI-compatible endpoint: rate limits, retries, and what its answers and refusals mean."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import openai
from aiolimiter import AsyncLimiter
from omegaconf import DictConfig
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from verl_avar.errors import ConfigError
from verl_avar.synthesis.waiting import Stopping, pause, turn

TOKEN_WINDOW_S = 10.0  # tokens are let through in shares of the minute: a whole minute's at once would be refused
FIRST_TOKENS = 1000.0  # a call's tokens, until some are known
REQUEST_WINDOW_S = 0.5
POOL = 8  # connections of one pool: finding a free one takes longer the more there are (128 requests/s with 64, 334 so)
GIVE_UP_S = 600.0  # without one answer while requests fail: the endpoint is down
KINDS = {408: "timeout", 409: "server_error", 429: "rate_limit"}


class EndpointError(RuntimeError):
    """The endpoint as a whole can't be used: a wrong key, model or address, or nothing answers any more."""


class CallFailed(RuntimeError):
    """No attempt got an answer; kind: timeout, connection, rate_limit, server_error or malformed."""

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


class _Transient(Exception):
    def __init__(self, kind: str, detail: str, after_s: float | None = None):
        super().__init__(detail)
        self.kind, self.after_s = kind, after_s


@dataclass(frozen=True)
class Answer:
    """What a model wrote. finish: the API's finish_reason, or bad_request where the endpoint refused the request."""

    text: str
    finish: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float


class Endpoint:
    """To be used within one event loop. Raises ConfigError where its key is not in the environment.

    may_go: asked before every request; false ends the call with Stopping.
    """

    def __init__(self, name: str, settings: DictConfig, may_go: Callable[[], bool] = lambda: True):
        self.name, self.settings, self.may_go = name, settings, may_go
        self.key = _key(name, settings)
        self.clients = [self._client() for _ in range(math.ceil(settings.concurrency / POOL))]
        self.turns = itertools.cycle(self.clients)
        self.places = asyncio.Semaphore(settings.concurrency)
        per_minute = settings.requests_per_minute
        self.requests = per_minute and AsyncLimiter(*_window(per_minute))
        per_minute = settings.tokens_per_minute
        self.tokens = per_minute and AsyncLimiter(per_minute * TOKEN_WINDOW_S / 60, TOKEN_WINDOW_S)
        self.expected: dict[str, float] = {}  # mean tokens of a model's calls
        self.counts: dict[str, Counter] = defaultdict(Counter)  # of each stage: requests, answers, failures by kind
        self.first = self.last = self.answered = None  # time.monotonic() of requests and of the last answer

    def _client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=self.settings.base_url,
            api_key=self.key or "none",
            max_retries=0,
            timeout=self.settings.timeout_s,
            http_client=openai.DefaultAsyncHttpxClient(
                follow_redirects=False,  # images and keys go to the named address and to no other
                trust_env=False,  # nor through a proxy that the config does not name
                proxy=self.settings.proxy,
                event_hooks={"request": [self._strip]},
            ),
        )

    async def _strip(self, request) -> None:
        """The client would take an organisation of OpenAI's from the environment, and send a key where none is due."""
        for header in ("openai-organization", "openai-project", *(() if self.key else ("authorization",))):
            request.headers.pop(header, None)

    async def close(self) -> None:
        for client in self.clients:
            await client.close()

    async def call(
        self, stage: str, model: str, messages: list[dict], sampling: dict, reasoning: bool = False
    ) -> Answer:
        """One call of a stage, with as many attempts as it takes or the settings allow.

        reasoning: put the answer's separate `reasoning_content` before it, in <think>…</think>. Raises CallFailed,
        EndpointError, and Stopping where `may_go` says so.
        """
        settings = self.settings
        backoff = wait_random_exponential(multiplier=settings.backoff_s, max=settings.backoff_max_s)

        def wait(state: RetryCallState) -> float:
            after = state.outcome.exception().after_s
            return backoff(state) if after is None else min(after, settings.backoff_max_s)

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_Transient),
            stop=stop_after_attempt(settings.attempts),
            wait=wait,
            sleep=lambda seconds: pause(seconds, self.may_go),
            reraise=True,
        )
        try:
            return await retrying(self._attempt, self.counts[stage], model, messages, sampling, reasoning)
        except _Transient as error:
            raise CallFailed(error.kind, f"{error} ({settings.attempts} attempts)") from None

    async def _attempt(
        self, counts: Counter, model: str, messages: list[dict], sampling: dict, reasoning: bool
    ) -> Answer:
        async with self.places:
            expected = self.expected.get(model, FIRST_TOKENS)
            if self.tokens:
                await turn(self.tokens, min(expected, self.tokens.max_rate), self.may_go)
            if self.requests:
                await turn(self.requests, 1, self.may_go)
            if not self.may_go():
                raise Stopping
            start = time.monotonic()
            self.first = self.first or start
            self.answered = self.answered or start
            self.last = start
            counts["requests"] += 1
            try:
                client = next(self.turns)
                reply = await client.chat.completions.create(model=model, messages=messages, extra_body=sampling)
                answer = _answer(reply, model, reasoning, time.monotonic() - start)
            except (openai.OpenAIError, json.JSONDecodeError, UnicodeDecodeError) as error:
                refused = self._judge(error, time.monotonic() - start)
                if isinstance(refused, Answer):
                    counts["bad_request"] += 1
                    return refused
                counts[refused.kind] += 1
                if time.monotonic() - self.answered > GIVE_UP_S:
                    raise EndpointError(
                        f"endpoint {self.name}: no answer for {GIVE_UP_S:.0f} s, last {refused.kind}: {refused}"
                    ) from None
                raise refused from None
            except _Transient as error:
                counts[error.kind] += 1
                raise
            self.answered = time.monotonic()
        counts["answers"] += 1
        used = answer.prompt_tokens + answer.completion_tokens
        self.expected[model] = used if model not in self.expected else 0.9 * expected + 0.1 * used
        if self.tokens and used > expected:
            await self.tokens.acquire(min(used - expected, self.tokens.max_rate))
        return answer

    def _judge(self, error: Exception, seconds: float) -> _Transient | Answer:
        """What an error means: try again, or an answer that refuses this request. Raises EndpointError for the rest."""
        detail = self.scrubbed(" ".join(str(error).split())[:300])
        if isinstance(error, openai.APITimeoutError):
            return _Transient("timeout", f"no answer within {self.settings.timeout_s:g} s")
        if isinstance(error, openai.APIStatusError):
            status = error.status_code
            if status in KINDS or status >= 500:
                if getattr(error, "code", None) == "insufficient_quota":
                    raise EndpointError(f"endpoint {self.name}: {detail}") from None
                return _Transient(KINDS.get(status, "server_error"), detail, _retry_after(error))
            if status in (400, 413, 422):
                return Answer(detail, "bad_request", "", 0, 0, seconds)
            if status in (401, 403):
                variable = self.settings.api_key_env
                how = f"check {variable}" if variable else "name the variable that holds its key in api_key_env"
                raise EndpointError(f"endpoint {self.name} refuses access ({status}); {how}: {detail}") from None
            if 300 <= status < 400:
                raise EndpointError(
                    f"endpoint {self.name}: {self.settings.base_url} redirects elsewhere, which is not followed; "
                    "write the final address into base_url"
                ) from None
            raise EndpointError(f"endpoint {self.name} ({self.settings.base_url}): {detail}") from None
        if isinstance(error, openai.APIConnectionError):
            cause = error.__cause__ or error
            return _Transient("connection", self.scrubbed(f"{type(cause).__name__}: {cause}")[:300])
        return _Transient("malformed", detail)

    def scrubbed(self, text: str) -> str:
        """Without the key: some servers repeat it in their errors."""
        return text.replace(self.key, "[key]") if self.key else text


def _key(name: str, settings: DictConfig) -> str | None:
    if settings.api_key_env is None:
        return None
    key = os.environ.get(settings.api_key_env, "").strip()
    if not key:
        raise ConfigError(
            f"endpoint {name}: the environment has no {settings.api_key_env} (endpoints.{name}.api_key_env)"
        )
    return key


def _window(per_minute: float) -> tuple[float, float]:
    """(requests, seconds) of a limit in windows short enough that a server's own window never sees a burst."""
    seconds = max(REQUEST_WINDOW_S, 60 / per_minute)
    return max(1.0, per_minute * seconds / 60), seconds


def _retry_after(error: openai.APIStatusError) -> float | None:
    for header, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            return max(0.0, float(error.response.headers.get(header, "")) / unit)
        except ValueError:  # not there, or a date
            continue
    return None


def _answer(reply, model: str, reasoning: bool, seconds: float) -> Answer:
    """Raises _Transient("malformed") for what is not a chat completion."""
    choices = getattr(reply, "choices", None)
    message = getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
    if message is None:
        raise _Transient("malformed", f"no choices in the answer: {str(reply)[:200]!r}")
    text, finish = message.content or "", choices[0].finish_reason or "unknown"
    if not text and getattr(message, "refusal", None):
        text, finish = message.refusal, "content_filter"
    thought = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    if reasoning and isinstance(thought, str) and thought.strip() and "<think>" not in text:
        text = f"<think>{thought.strip()}</think>{text}"
    usage = reply.usage
    counts = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
    return Answer(text, finish, reply.model or model, *counts, seconds)
