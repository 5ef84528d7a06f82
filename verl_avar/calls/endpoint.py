"""One OpenAI-compatible endpoint: rate limits, retries, and what its answers and refusals mean."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine
from typing import Any

import openai
from omegaconf import DictConfig
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from verl_avar.calls.answer import BAD_REQUEST, Answer, read, utf8
from verl_avar.calls.limits import Limits
from verl_avar.errors import ConfigError

POOL = 8  # connections of one pool: finding a free one takes longer the more there are (128 requests/s with 64, 334 so)
GIVE_UP_S = 600.0  # of nothing but failed requests, and as long as one may take: the endpoint is down
REFUSED = 30  # requests of a stage, its first ones and all of them refused: it isn't the rows
PAUSE_S = 0.5  # between looks at whether a waiting call may still go
KINDS = {408: "timeout", 409: "server_error", 429: "rate_limit"}


class EndpointError(RuntimeError):
    """The endpoint as a whole can't be used: a wrong key, model or address, or nothing answers any more."""


class Stopping(Exception):
    """No more requests are to be made: the budget is spent, or the run was asked to end."""


class CallFailed(RuntimeError):
    """No attempt got an answer; kind: timeout, connection, rate_limit, server_error or malformed."""

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


class _Transient(Exception):
    def __init__(self, kind: str, detail: str, after_s: float | None = None):
        super().__init__(detail)
        self.kind, self.after_s = kind, after_s


class Endpoint:
    """To be used within one event loop. Raises ConfigError where its key is not in the environment.

    may_go: asked before every request; false ends the call with Stopping.
    """

    def __init__(self, name: str, settings: DictConfig, may_go: Callable[[], bool] = lambda: True):
        self.name, self.settings, self.may_go = name, settings, may_go
        self.key = key_of(name, settings)
        self.clients = [self._client() for _ in range(math.ceil(settings.concurrency / POOL))]
        self.turns = itertools.cycle(self.clients)
        self.places = asyncio.Semaphore(settings.concurrency)
        self.limits = Limits(settings.requests_per_minute, settings.tokens_per_minute)
        self.counts: dict[str, Counter] = defaultdict(Counter)  # of each stage: requests, answers, failures by kind
        self.first = self.last = None  # time.monotonic() of requests
        self.under_way = 0  # calls
        self.failing: float | None = None  # since when nothing but failures

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
            sleep=self._pause,
            reraise=True,
        )
        if not self.under_way:
            self.failing = None  # what failed before it had nothing to do says nothing of now
        self.under_way += 1
        try:
            return await retrying(self._attempt, self.counts[stage], model, messages, sampling, reasoning)
        except _Transient as error:
            raise CallFailed(error.kind, f"{error} ({settings.attempts} attempts)") from None
        finally:
            self.under_way -= 1

    async def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.may_go() and (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(left, PAUSE_S))

    async def _unless_stopping(self, wait: Coroutine) -> Any:
        """What a wait returns, unless the run is to end before. Raises Stopping."""
        task = asyncio.ensure_future(wait)
        try:
            while self.may_go():
                if (await asyncio.wait({task}, timeout=PAUSE_S))[0]:
                    return task.result()
            raise Stopping
        finally:
            task.cancel()

    async def _admitted(self, model: str) -> float:
        """Waits until the limits allow a call; returns the tokens that were taken for it. Raises Stopping."""
        async with self.limits.turn:
            expected = await self._unless_stopping(self.limits.tokens_for(model))
            if self.limits.requests:
                await self._unless_stopping(self.limits.requests.acquire())
        if not self.may_go():
            raise Stopping
        return expected

    async def _attempt(
        self, counts: Counter, model: str, messages: list[dict], sampling: dict, reasoning: bool
    ) -> Answer:
        async with self.places:
            expected = await self._admitted(model)
            start = self.last = time.monotonic()
            self.first = self.first or start
            counts["requests"] += 1
            try:
                answer = await self._request(model, messages, sampling, reasoning)
            except _Transient as error:
                counts[error.kind] += 1
                self.failing = self.failing or time.monotonic()
                patience = GIVE_UP_S + self.settings.timeout_s
                if time.monotonic() - self.failing > patience:
                    raise EndpointError(
                        f"endpoint {self.name}: no answer for {patience:.0f} s, last {error.kind}: {error}"
                    ) from None
                raise
            self.failing = None
        if answer.finish == BAD_REQUEST:
            counts[BAD_REQUEST] += 1
            if counts[BAD_REQUEST] >= REFUSED and not counts["answers"]:
                raise EndpointError(
                    f"endpoint {self.name} refused all of {counts[BAD_REQUEST]} requests, the last: {answer.text}. "
                    f"Correct the settings, and have those rows asked again (avar synth: --retry {BAD_REQUEST})"
                )
            return answer
        counts["answers"] += 1
        self.limits.used(model, expected, answer.prompt_tokens + answer.completion_tokens)
        return answer

    async def _request(self, model: str, messages: list[dict], sampling: dict, reasoning: bool) -> Answer:
        """Raises _Transient and EndpointError."""
        start = time.monotonic()
        create = next(self.turns).chat.completions.create
        try:
            # The client's own timeout is of each read: an answer that trickles in would never end.
            reply = await asyncio.wait_for(
                create(model=model, messages=messages, extra_body=sampling), self.settings.timeout_s
            )
        except asyncio.TimeoutError:
            raise self._late() from None
        except (openai.OpenAIError, json.JSONDecodeError, UnicodeDecodeError) as error:
            refused = self._judge(error, time.monotonic() - start)
            if isinstance(refused, Answer):
                return refused
            raise refused from None
        answer = read(reply, model, reasoning, time.monotonic() - start)
        if answer is None:
            raise _Transient("malformed", self.scrubbed(f"no chat completion: {str(reply)!r}")[:300])
        return answer

    def _late(self) -> _Transient:
        return _Transient("timeout", f"no answer within {self.settings.timeout_s:g} s")

    def _judge(self, error: Exception, seconds: float) -> _Transient | Answer:
        """What an error means: try again, or an answer that refuses this request. Raises EndpointError for the rest."""
        detail = self.scrubbed(" ".join(str(error).split()))[:300]
        if isinstance(error, openai.APITimeoutError):
            return self._late()
        if isinstance(error, openai.APIStatusError):
            status = error.status_code
            if status in KINDS or status >= 500:
                if getattr(error, "code", None) == "insufficient_quota":
                    raise EndpointError(f"endpoint {self.name}: {detail}") from None
                return _Transient(KINDS.get(status, "server_error"), detail, _retry_after(error))
            if status in (400, 413, 422):
                return Answer(detail, BAD_REQUEST, "", 0, 0, seconds)
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
        """Without the key, which some servers repeat in their errors, and such that UTF-8 can hold it."""
        return utf8(text.replace(self.key, "[key]") if self.key else text)


def key_of(name: str, settings: DictConfig) -> str | None:
    """An endpoint's key, from the environment. Raises ConfigError where it is not there, or is no key."""
    if settings.api_key_env is None:
        return None
    key = os.environ.get(settings.api_key_env, "").strip()
    if not key:
        raise ConfigError(
            f"endpoint {name}: the environment has no {settings.api_key_env} (endpoints.{name}.api_key_env)"
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            f"endpoint {name}: {settings.api_key_env} holds something that no key has: a line break, “ or ”"
        )
    return key


def _retry_after(error: openai.APIStatusError) -> float | None:
    for header, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            return max(0.0, float(error.response.headers.get(header, "")) / unit)
        except ValueError:  # not there, or a date
            continue
    return None
