"""An endpoint's client: what it sends and to whom, what it tries again, what it gives up on."""

import asyncio
import json
import time
from contextlib import ExitStack

import pytest
from http_endpoint import HttpEndpoint, completion
from omegaconf import OmegaConf

from verl_avar.calls import endpoint as module
from verl_avar.calls import limits
from verl_avar.calls.endpoint import CallFailed, Endpoint, EndpointError, Stopping
from verl_avar.errors import ConfigError
from verl_avar.synthesis.config import Endpoint as Settings

ASK = [{"role": "user", "content": "2 + 2?"}]
KEY = "sk-very-secret-123"


@pytest.fixture
def serve():
    """serve(*replies) -> (base_url, requests): answers with the replies in turn, the last one for ever.

    A reply is (status, body, headers): body a dict as JSON, or bytes as they are.
    """
    with ExitStack() as open_ones:

        def start(*replies):
            endpoint = HttpEndpoint(lambda body, before: replies[min(before, len(replies) - 1)])
            open_ones.enter_context(endpoint)
            return endpoint.url, endpoint.seen

        yield start


def ask(base_url, times=1, may_go=lambda: True, messages=ASK, sampling=None, reasoning=False, **settings):
    """(answers or errors, counts) of calls made at the same time."""

    async def calls():
        defaults = {"base_url": base_url, "backoff_s": 0.001, "attempts": 4}
        endpoint = Endpoint("e", OmegaConf.structured(Settings(**defaults | settings)), may_go)
        try:
            asked = (endpoint.call("reason", "m", messages, sampling or {}, reasoning) for _ in range(times))
            return await asyncio.gather(*asked, return_exceptions=True), dict(endpoint.counts["reason"])
        finally:
            await endpoint.close()

    return asyncio.run(calls())


def test_an_answer_comes_with_its_finish_and_tokens(serve):
    url, seen = serve((200, completion("four", "length"), {}))
    sampling = {"temperature": 0.5, "seed": 3, "max_tokens": 9, "top_k": 20}  # the last of the server's own
    (answer,), counts = ask(url, sampling=sampling)
    assert (answer.text, answer.finish, answer.model) == ("four", "length", "m-1")
    assert (answer.prompt_tokens, answer.completion_tokens) == (7, 3)
    assert counts == {"requests": 1, "answers": 1}
    assert seen[0]["body"] == {"model": "m", "messages": ASK, **sampling}


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ((429, {"error": {"message": "slow down"}}, {"retry-after": "0.01"}), "rate_limit"),
        ((500, {"error": {"message": "oops"}}, {}), "server_error"),
        ((503, b"<html>busy</html>", {"content-type": "text/html"}), "server_error"),
        ((200, b'{"id": "1", "choi', {}), "malformed"),
        ((200, b"\xff\xfe", {}), "malformed"),
        ((200, {"object": "something else"}, {}), "malformed"),
        ((200, {**completion(), "choices": []}, {}), "malformed"),
        ((200, b"plain text", {"content-type": "text/plain"}), "malformed"),
        ((200, b'{"id": ', {"x-cut": "50"}), "connection"),
    ],
)
def test_what_may_pass_is_tried_again_and_counted(serve, reply, kind):
    url, seen = serve(reply, reply, (200, completion(), {}))
    (answer,), counts = ask(url)
    assert answer.text == "4" and len(seen) == 3
    assert counts == {"requests": 3, kind: 2, "answers": 1}
    url, seen = serve(reply)
    (error,), counts = ask(url)
    assert isinstance(error, CallFailed) and error.kind == kind and "(4 attempts)" in str(error)
    assert len(seen) == 4 and counts == {"requests": 4, kind: 4}


def test_an_answer_that_takes_too_long_is_a_timeout(serve):
    async def silent():
        server = await asyncio.start_server(lambda *_: asyncio.sleep(0), "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        settings = OmegaConf.structured(Settings(base_url=url, timeout_s=0.1, attempts=2, backoff_s=0.001))
        endpoint = Endpoint("e", settings)
        async with server:
            with pytest.raises(CallFailed) as error:
                await endpoint.call("reason", "m", ASK, {})
        await endpoint.close()
        return error.value.kind, dict(endpoint.counts["reason"])

    assert asyncio.run(silent()) == ("timeout", {"requests": 2, "timeout": 2})


def test_nobody_listening_is_a_failed_call(serve):
    (error,), _ = ask("http://127.0.0.1:9/v1")
    assert isinstance(error, CallFailed) and error.kind == "connection"


def test_a_stated_wait_is_kept(serve):
    url, seen = serve((429, {"error": {"message": "wait"}}, {"retry-after": "0.3"}), (200, completion(), {}))
    ask(url)
    assert 0.3 <= seen[1]["time"] - seen[0]["time"] < 0.6


def test_a_request_that_is_refused_is_an_answer(serve):
    url, seen = serve((400, {"error": {"message": "image too large"}}, {}))
    (answer,), counts = ask(url)
    assert answer.finish == "bad_request" and "image too large" in answer.text and len(seen) == 1
    assert counts == {"requests": 1, "bad_request": 1}


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ((401, {"error": {"message": f"bad key {KEY}"}}, {}), "refuses access (401); check AVAR_TEST_KEY"),
        ((404, {"error": {"message": "no model m"}}, {}), "no model m"),
        ((307, b"", {"location": "http://127.0.0.1:9/v1"}), "redirects elsewhere"),
        ((429, {"error": {"message": "no money", "code": "insufficient_quota"}}, {}), "no money"),
    ],
)
def test_an_endpoint_that_cannot_be_used_is_said_once_without_its_key(serve, monkeypatch, reply, words):
    monkeypatch.setenv("AVAR_TEST_KEY", KEY)
    url, seen = serve(reply)
    (error,), _ = ask(url, api_key_env="AVAR_TEST_KEY")
    assert isinstance(error, EndpointError) and words in str(error) and KEY not in str(error)
    assert len(seen) == 1 and seen[0]["headers"]["authorization"] == f"Bearer {KEY}"


def test_the_key_is_scrubbed_from_answers_that_repeat_it(serve, monkeypatch):
    monkeypatch.setenv("AVAR_TEST_KEY", KEY)
    for status in (400, 500):
        url, _ = serve((status, {"error": {"message": f"key {KEY} is fine, the rest is not"}}, {}))
        (answer,), _ = ask(url, api_key_env="AVAR_TEST_KEY", attempts=1)
        assert KEY not in str(answer) and "[key]" in str(answer)


def test_a_missing_key_is_named_before_anything_is_sent(serve):
    url, seen = serve((200, completion(), {}))
    with pytest.raises(ConfigError, match="no AVAR_NO_SUCH_KEY"):
        ask(url, api_key_env="AVAR_NO_SUCH_KEY")
    assert seen == []


def test_nothing_of_the_environment_is_sent(serve, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, KEY)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    url, seen = serve((200, completion(), {}))
    (answer,), _ = ask(url)
    assert answer.text == "4"
    assert KEY not in json.dumps(seen) and "authorization" not in seen[0]["headers"]


def test_separate_reasoning_goes_before_the_answer_where_it_is_wanted(serve):
    url, _ = serve((200, completion("<answer>4</answer>", message={"reasoning_content": "two and two"}), {}))
    (answer,), _ = ask(url, reasoning=True)
    assert answer.text == "<think>two and two</think><answer>4</answer>"
    (answer,), _ = ask(url)
    assert answer.text == "<answer>4</answer>"


def test_a_refusal_field_is_a_filtered_answer(serve):
    url, _ = serve((200, completion(None, message={"refusal": "I can't help with that."}), {}))
    (answer,), _ = ask(url)
    assert (answer.text, answer.finish) == ("I can't help with that.", "content_filter")


def test_no_request_is_made_once_it_may_not(serve):
    url, seen = serve((200, completion(), {}))
    (error,), counts = ask(url, may_go=lambda: False)
    assert isinstance(error, Stopping) and seen == [] and counts == {}


@pytest.mark.parametrize(
    ("reply", "settings"),
    [
        ((200, completion(), {}), {"requests_per_minute": 2.0}),
        ((200, completion(), {}), {"tokens_per_minute": 600.0}),
        ((429, {"error": {"message": "wait"}}, {"retry-after": "50"}), {}),
        ((500, {"error": {"message": "oops"}}, {}), {"backoff_s": 50.0}),
    ],
)
def test_no_wait_holds_up_a_run_that_is_to_end(serve, reply, settings):
    url, seen = serve(reply)
    start = time.monotonic()
    results, _ = ask(url, times=3, may_go=lambda: time.monotonic() < start + 1, **settings)
    assert time.monotonic() - start < 5 and seen
    assert sum(isinstance(result, Stopping) for result in results) >= 2


def test_requests_keep_to_the_stated_rate_and_use_it(serve):
    url, seen = serve((200, completion(), {}))
    rate = 40.0  # a second
    answers, _ = ask(url, times=100, requests_per_minute=60 * rate, concurrency=8)
    times = [request["time"] for request in seen]
    assert len(answers) == 100
    for start in times:  # a window of a second has the rate, and the burst that the limiter allows
        assert sum(start <= t < start + 1 for t in times) <= rate * 1.6
    assert 99 / (times[-1] - times[0]) == pytest.approx(rate, rel=0.35)


def test_tokens_keep_to_the_stated_rate(serve, monkeypatch):
    monkeypatch.setattr(limits, "TOKEN_WINDOW_S", 0.2)
    monkeypatch.setattr(limits, "FIRST_TOKENS", 10.0)
    url, seen = serve((200, completion(), {}))  # 10 tokens each
    ask(url, times=30, tokens_per_minute=60 * 200)  # 20 calls a second
    assert seen[-1]["time"] - seen[0]["time"] > 1.0


def test_an_endpoint_that_gives_no_answer_any_more_ends_the_run(serve, monkeypatch):
    monkeypatch.setattr(module, "GIVE_UP_S", 0.05)
    url, _ = serve((500, {"error": {"message": "down"}}, {"retry-after": "0.2"}))
    (error,), _ = ask(url, timeout_s=0.1)
    assert isinstance(error, EndpointError) and "no answer for" in str(error)
