"""What a synthesis run survives: odd answers, damaged files, a full disk, bad prompts, signals, mistaken settings."""

import asyncio
import errno
import os
import resource
import signal
import time
from contextlib import ExitStack

import http_endpoint
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from verl_avar.calls import endpoint as endpoint_module
from verl_avar.calls import limits as limits_module
from verl_avar.calls import store
from verl_avar.calls.endpoint import CallFailed, Endpoint, EndpointError, Stopping
from verl_avar.calls.limits import Limits
from verl_avar.calls.store import CALLS, Lines, Writer, call_key, locked
from verl_avar.data.schema import ROWS, content_id
from verl_avar.errors import ConfigError
from verl_avar.synthesis import card
from verl_avar.synthesis import config as config_module
from verl_avar.synthesis.config import Endpoint as Settings
from verl_avar.synthesis.intake import REJECTS
from verl_avar.synthesis.pipeline import BUDGET, SIGNALLED, Progress
from verl_avar.synthesis.prompt import template_hash
from verl_avar.synthesis.run import make_calls
from verl_avar.synthesis.settle import check_reasons, send_again, walked

ASK = [{"role": "user", "content": "2 + 2?"}]
KEY = "sk-very-secret-123"
PNG = b"\x89PNG\r\n\x1a\n"
GOOD = "<think>In the image I see a cat. Looking at the image again, it sits.</think><answer>cat</answer>"
YAML = """
name: robust
sources: [{path: nowhere}]
endpoints: {e: {base_url: 'http://127.0.0.1:9/v1', concurrency: 4, attempts: 2, backoff_s: 0.001, timeout_s: 10}}
stages:
  describe: {endpoint: e, model: m}
  reason: {endpoint: e, model: m}
  anchor: {endpoint: e, model: m}
checks:
  describe: {min_words: 0}
  reason: {min_words: 0}
  anchor: {min_words: 0, min_anchors: 1, min_spread: 0.0}
"""


def completion(content=GOOD, **choice):
    return http_endpoint.completion(content, choice=choice)


@pytest.fixture
def serve():
    """serve(reply) -> (base_url, bodies of the requests): reply as HttpEndpoint has it, or what it gives, for ever."""
    with ExitStack() as open_ones:

        def start(reply):
            endpoint = http_endpoint.HttpEndpoint(reply if callable(reply) else lambda body, before: reply)
            open_ones.enter_context(endpoint)
            return endpoint.url, endpoint.bodies

        yield start


def settings(base_url, **given):
    return OmegaConf.structured(Settings(**{"base_url": base_url, "backoff_s": 0.001, "attempts": 2} | given))


def ask(base_url, times=1, **given):
    """Answers or errors of calls made at the same time."""

    async def calls():
        endpoint = Endpoint("e", settings(base_url, **given))
        try:
            asked = (endpoint.call("reason", "m", ASK, {}) for _ in range(times))
            return await asyncio.gather(*asked, return_exceptions=True)
        finally:
            await endpoint.close()

    return asyncio.run(calls())


@pytest.fixture
def folder(tmp_path):
    """folder(number of rows, base_url, overrides) -> (config, out), with the rows as intake leaves them."""

    def make(rows, base_url="http://127.0.0.1:9/v1", *overrides, questions=None):
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        (tmp_path / "run.yaml").write_text(YAML)
        found = []
        for number, question in enumerate(questions or [f"<image>What is it, {n}?" for n in range(rows)]):
            row = {"question": question, "answer": "cat", "choices": [], "images": [{"bytes": PNG}]}
            place = {"source": "s", "source_row": number, "meta": "{}"}
            found.append(row | place | {"id": content_id(question, "cat", [], [PNG])})
        pq.write_table(pa.Table.from_pylist(found, ROWS), out / "rows.parquet")
        pq.write_table(pa.Table.from_pylist([], REJECTS), out / "intake.parquet")
        (out / "intake.json").write_text('{"sources": {"s": {}}}')
        given = [f"out={out}", f"endpoints.e.base_url={base_url}", *overrides]
        return config_module.load(tmp_path / "run.yaml", given), out

    return make


def run(config, out):
    """The calls of a run; returns its progress."""
    progress = Progress()
    make_calls(config, out, progress)
    return progress


def statuses(config, out):
    return [(row["status"], row["reason"]) for row in walked(config, out)]


# Stored calls


@pytest.mark.parametrize(
    "damage",
    [
        b'{"key": "zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz", "text": "no key"}\n',
        b"\0" * 100 + b"\n",
        b'{"key": "0123456789abcdef0123456789abcdef", "te{"key": "0123456789abcdef0123456789abcdef"}\n',
        b'{"key": "0123456789abcdef0123456789abcdef", "text": "\xff"}\n',
        b"<html>\n\n",
    ],
)
def test_a_damaged_line_in_the_middle_costs_that_line_alone(tmp_path, damage):
    writer = Writer(tmp_path, "a")
    for number in range(3):
        writer.add(call_key(number), {"number": number})
    writer.close()
    (shard,) = tmp_path.iterdir()
    first, *rest = shard.read_bytes().splitlines(keepends=True)
    shard.write_bytes(first + damage + b"".join(rest))
    with Lines(tmp_path) as lines:
        assert [lines.get(call_key(number)) for number in range(3)] == list(lines)
        assert [call["number"] for call in lines] == [0, 1, 2]
        assert lines.get("0123456789abcdef0123456789abcdef") is None


@pytest.fixture
def disk():
    """disk(size): no file may grow beyond it, as on a disk that is nearly full; disk(None): there is room again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, before if size is None else (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_line_that_the_disk_has_no_room_for_leaves_no_half(tmp_path, disk):
    writer = Writer(tmp_path, "a")
    writer.add(call_key(0), {"text": "x" * 100})
    disk(500)
    with pytest.raises(OSError, match=r"a-00000\.jsonl") as error:
        writer.add(call_key(1), {"text": "x" * 1000})
    assert error.value.errno in (errno.ENOSPC, errno.EFBIG)
    disk(None)
    writer.add(call_key(2), {"text": "short"})
    writer.close()
    with Lines(tmp_path) as lines:
        assert [len(call["text"]) for call in lines] == [100, 5]


def test_more_shards_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "OPEN", 2)
    for number in range(5):
        writer = Writer(tmp_path, str(number))
        writer.add(call_key(number), {"number": number})
        writer.close()
    with Lines(tmp_path) as lines:
        assert [lines.get(call_key(n))["number"] for n in (0, 1, 2, 3, 4, 0, 2, 4)] == [0, 1, 2, 3, 4, 0, 2, 4]
        assert len(lines._open) == 2


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(store.fcntl, "flock", flock)
    with locked(tmp_path / "out"):
        assert (tmp_path / "out").is_dir()


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    for name in (".rows.parquet.123", ".lock", "rows.parquet", ".card.tmp", ".a.b"):
        (tmp_path / name).touch()
    (tmp_path / ".dataset.77").mkdir()
    store.remove_parts(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.b", ".card.tmp", ".lock", "rows.parquet"]


# Answers


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (completion("half \ud83d pair"), "half ? pair"),
        (completion("nul \0 byte"), "nul \0 byte"),
        (
            completion([{"type": "text", "text": "two "}, {"type": "image"}, {"type": "text", "text": "parts"}]),
            "two parts",
        ),
        (completion(None), ""),
        (completion(finish_reason=None), GOOD),
        (completion() | {"usage": None}, GOOD),
        (completion() | {"usage": {}}, GOOD),
        (completion() | {"model": None}, GOOD),
        (completion("x" * 5_000_000), "x" * 5_000_000),
    ],
)
def test_odd_answers_are_read_and_can_be_stored(serve, tmp_path, reply, text):
    url, _ = serve(reply)
    (answer,) = ask(url)
    assert answer.text == text and answer.finish == (reply["choices"][0]["finish_reason"] or "unknown")
    assert answer.prompt_tokens + answer.completion_tokens == (10 if reply["usage"] else 0)
    Writer(tmp_path, "a").add(call_key(1), vars(answer))
    with Lines(tmp_path) as lines:
        assert lines.get(call_key(1))["text"] == text


@pytest.mark.parametrize("message", ["hello", 3, {"content": 3}, {"content": {"a": 1}}])
def test_what_is_no_message_is_malformed(serve, message):
    url, seen = serve(completion(message=message))
    (error,) = ask(url)
    assert isinstance(error, CallFailed) and error.kind == "malformed" and len(seen) == 2


def test_an_answer_that_trickles_in_for_ever_is_a_timeout():
    async def trickle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100000\r\n\r\n")
        while not writer.is_closing():
            writer.write(b" ")
            await asyncio.sleep(0.02)

    async def asked():
        server = await asyncio.start_server(trickle, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        endpoint = Endpoint("e", settings(url, timeout_s=0.2, attempts=1))
        with pytest.raises(CallFailed) as error:
            await asyncio.wait_for(endpoint.call("reason", "m", ASK, {}), 5)
        await endpoint.close()
        server.close()
        return error.value.kind

    assert asyncio.run(asked()) == "timeout"


def test_a_key_is_kept_out_of_what_is_no_completion_and_of_cut_details(serve, monkeypatch):
    monkeypatch.setenv("AVAR_TEST_KEY", KEY)
    for reply in ({"echo": f"Bearer {KEY}"}, (500, b"x" * 290 + KEY.encode()), (400, b"y" * 273 + KEY.encode())):
        url, _ = serve(reply)
        (error,) = ask(url, api_key_env="AVAR_TEST_KEY")
        assert KEY[:6] not in str(error)


def test_a_key_that_no_header_can_carry_is_a_mistake_and_is_not_shown(monkeypatch):
    monkeypatch.setenv("AVAR_TEST_KEY", "“sk-secret”")
    with pytest.raises(ConfigError, match="AVAR_TEST_KEY") as error:
        ask("http://127.0.0.1:9/v1", api_key_env="AVAR_TEST_KEY")
    assert "secret" not in str(error.value)


def test_one_failure_after_a_long_rest_is_no_endpoint_that_is_down(serve, monkeypatch):
    monkeypatch.setattr(endpoint_module, "GIVE_UP_S", 1.0)
    url, _ = serve(lambda body, before: (500, b"{}") if before in (1, 2, 3) else completion())

    async def calls():
        endpoint = Endpoint("e", settings(url, timeout_s=10))
        results = []
        for _ in range(3):  # answered; both attempts fail; one fails, the next is answered
            results += await asyncio.gather(endpoint.call("reason", "m", ASK, {}), return_exceptions=True)
            await asyncio.sleep(1.1)
        await endpoint.close()
        return results

    first, second, third = asyncio.run(calls())
    assert first.text == third.text == GOOD and isinstance(second, CallFailed)


def test_a_stage_of_which_every_request_is_refused_ends_the_run(serve, monkeypatch):
    monkeypatch.setattr(endpoint_module, "REFUSED", 5)
    url, _ = serve((400, b'{"error": {"message": "API key not valid"}}'))
    results = ask(url, times=6, concurrency=1)
    assert [result.finish for result in results[:4]] == ["bad_request"] * 4
    assert "refused all of 5 requests" in str(results[4]) and "API key not valid" in str(results[4])
    url, _ = serve(lambda body, before: (400, b"{}") if before else completion())
    assert not any(isinstance(result, EndpointError) for result in ask(url, times=7, concurrency=1))


@pytest.mark.parametrize("limit", [{"requests_per_minute": 4.0}, {"tokens_per_minute": 60.0}, {"backoff_s": 50.0}])
def test_calls_that_wait_for_their_turn_end_when_the_run_does(serve, monkeypatch, limit):
    url, _ = serve((500, b"{}") if "backoff_s" in limit else completion())
    if "requests_per_minute" in limit:
        monkeypatch.setattr(limits_module, "_window", lambda per_minute: (1.0, 1.0))
    monkeypatch.setattr(limits_module, "TOKEN_WINDOW_S", 1.0)

    async def calls():
        endpoint = Endpoint("e", settings(url, concurrency=8, **limit), lambda: time.monotonic() < end)
        end, start = time.monotonic() + 0.3, time.monotonic()
        asked = (endpoint.call("reason", "m", ASK, {}) for _ in range(20))
        results = await asyncio.gather(*asked, return_exceptions=True)
        await endpoint.close()
        return results, time.monotonic() - start

    results, took = asyncio.run(calls())
    assert took < 3 and any(isinstance(result, Stopping) for result in results)


def test_the_stated_tokens_are_used_where_calls_differ():
    async def tokens():
        limits = Limits(None, 60 * 10_000)
        start, total = time.monotonic(), 0
        limits.tokens._level = limits.tokens.max_rate  # as in the middle of a run
        limits.tokens._last_check = asyncio.get_running_loop().time()
        for number in range(150):
            expected = await limits.tokens_for("m")
            used = 10 if number % 2 else 190
            limits.used("m", expected, used)
            total += used
        return total / (time.monotonic() - start)

    assert asyncio.run(tokens()) == pytest.approx(10_000, rel=0.1)


def test_large_calls_are_not_overtaken_by_small_ones():
    async def order():
        limits, found = Limits(None, 60 * 2000), []
        limits.means |= {"large": 200.0, "small": 20.0}
        limits.tokens._level = limits.tokens.max_rate
        limits.tokens._last_check = asyncio.get_running_loop().time()

        async def call(model):
            async with limits.turn:
                await limits.tokens_for(model)
                found.append(model)

        await asyncio.gather(*(call(model) for model in ["large", *["small"] * 5]))
        return found

    assert asyncio.run(order()) == ["large", *["small"] * 5]


# Runs


def test_a_full_disk_ends_the_run_with_what_was_stored_and_the_next_goes_on(serve, folder, disk, caplog):
    url, seen = serve(completion())
    config, out = folder(12, url)
    disk(4000)  # some calls of about 500 bytes
    with pytest.raises(OSError, match=r"calls/.*jsonl"):
        run(config, out)
    disk(None)
    with Lines(out / CALLS) as stored:
        kept = len(stored)
    assert 5 <= kept < 12 and len(seen) <= kept + 4 + 4  # those in flight
    asked = len(seen)
    run(config, out)
    assert len(seen) - asked == 36 - kept
    assert statuses(config, out) == [("accepted", None)] * 12
    assert "never retrieved" not in caplog.text and "shutdown" not in caplog.text


def test_a_prompt_that_some_row_cannot_be_put_into_ends_the_run_and_keeps_what_was_answered(
    serve, folder, tmp_path, caplog
):
    url, _ = serve(completion())
    template = "{% block user %}{{ question }}{% if '3' in question %}{{ choices[0] }}{% endif %}{% endblock %}"
    (tmp_path / "reason.jinja").write_text(template)
    config, out = folder(8, url, "stages.reason.prompt=reason.jinja")
    with pytest.raises(ConfigError, match=r"^row 3 of s: .*reason\.jinja, line 1"):
        run(config, out)
    with Lines(out / CALLS) as stored:
        assert sum(call["stage"] == "describe" for call in stored) >= 4
    assert "never retrieved" not in caplog.text and "shutdown" not in caplog.text


def test_a_budget_that_cannot_be_kept_is_said(serve, folder):
    url, seen = serve(completion() | {"usage": None})
    config, out = folder(20, url, "budget.tokens=1000")
    with pytest.raises(EndpointError, match="how many tokens"):
        run(config, out)
    assert len(seen) <= 4 + 1


def test_a_budget_is_overshot_by_no_more_than_what_is_in_flight_and_holds_for_all_runs(serve, folder):
    url, seen = serve(completion())
    config, out = folder(20, url, "budget.tokens=100")
    assert run(config, out).stop == BUDGET
    assert 10 <= len(seen) <= 10 + 3
    asked = len(seen)
    assert run(config, out).stop == BUDGET
    assert len(seen) == asked


def test_rows_with_the_same_content_are_asked_about_once(serve, folder):
    url, seen = serve(completion())
    questions = ["<image>What is it?", "<image>And this?", "<image>What is it?", "<image>What is it?"]
    config, out = folder(0, url, "duplicates.exact=false", questions=questions)
    progress = run(config, out)
    assert len(seen) == 6 and progress.rows == {"accepted": 2, "repeated": 2}
    assert statuses(config, out) == [("accepted", None)] * 4


def test_a_signal_lets_requests_in_flight_end_and_gives_the_handlers_back(serve, folder):
    def reply(body, before):
        if before == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        return completion()

    url, seen = serve(reply)
    config, out = folder(30, url)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert run(config, out).stop == SIGNALLED
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    with Lines(out / CALLS) as stored:
        assert len(stored) == len(seen) < 15


# --retry


def test_rows_are_asked_again_once_until_they_were(serve, folder):
    answers = iter([])
    url, seen = serve(lambda body, before: completion(next(answers, GOOD)))
    config, out = folder(1, url)
    answers = iter(["a cat", GOOD.replace("cat</a", "dog</a")])
    run(config, out)
    assert statuses(config, out) == [("rejected", "wrong_answer")] and len(seen) == 2
    assert send_again(config, out, ["leak", "reason:wrong_answer"]) == {"leak": 0, "reason:wrong_answer": 1}
    assert send_again(config, out, ["wrong_answer"]) == {"wrong_answer": 0}  # not made yet
    assert statuses(config, out) == [("pending", None)]
    run(config, out)
    assert statuses(config, out) == [("accepted", None)] and len(seen) == 4


def test_rows_of_the_same_content_are_marked_once(serve, folder):
    url, _ = serve(completion("a cat"))
    config, out = folder(0, url, "duplicates.exact=false", questions=["<image>What is it?"] * 3)
    run(config, out)
    assert send_again(config, out, ["format"]) == {"format": 3}
    assert len((out / "retries.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("reason", ["wrong", "duplicate", "attention_low", "anchr:leak", "intake:format", ""])
def test_a_reason_that_no_stage_has_is_a_mistake(reason):
    check_reasons(["format", "reason:format"])
    with pytest.raises(ConfigError, match=f"--retry {reason}: "):
        check_reasons(["format", reason])


# Keys of calls and settings


def keys(config, out):
    """Of the first calls of every row."""
    from verl_avar.synthesis.pipeline import read_attempts, read_rows
    from verl_avar.synthesis.walk import Unanswered, walk

    found = []

    async def asked(one):
        found.append(one.key)
        raise Unanswered("pending")

    for row in read_rows(out / "rows.parquet"):
        asyncio.run(walk(row, config, read_attempts(out), asked, None))
    return found


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("endpoints.e.concurrency=9", True),
        ("endpoints.e.timeout_s=9", True),
        ("endpoints.e.base_url=http://127.0.0.1:8/v1", True),
        ("name=other", True),
        ("checks.describe.min_words=7", True),
        ("budget.tokens=7", True),
        ("stages.describe.price.prompt=7", True),
        ("stages.describe.candidates=2", True),
        ("stages.describe.model=m2", False),
        ("stages.describe.sampling.temperature=0.5", False),
        ("stages.describe.reasoning=true", False),
        ("stages.describe.send_seed=false", False),
        ("seed=1", False),
    ],
)
def test_what_decides_an_answer_is_in_its_key_and_nothing_else(folder, override, same):
    before, after = keys(*folder(2)), keys(*folder(2, "http://127.0.0.1:9/v1", override))
    assert after == before if same else not set(after) & set(before)


def test_an_edited_prompt_is_another_call(folder, tmp_path):
    (tmp_path / "d.jinja").write_text("{% block user %}Describe. {{ question }}{% endblock %}")
    (tmp_path / "d2.jinja").write_text("{% block user %}Describe! {{ question }}{% endblock %}")
    made = [
        keys(*folder(1, "http://127.0.0.1:9/v1", f"stages.describe.prompt={name}")) for name in ("d.jinja", "d2.jinja")
    ]
    assert made[0] != made[1]


def test_the_card_knows_the_prompt_by_the_hash_that_the_summary_has(tmp_path):
    template = tmp_path / "d.jinja"
    template.write_bytes("{% block user %}Beschreibe ä.\r\n{{ question }}{% endblock %}".encode())
    for path in (None, str(template)):
        stage = {"prompt_sha256": template_hash(path, "describe")}
        assert "{{ question }}" in card.prompt("describe", stage, path)["text"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("endpoints.e.base_url=https://user:hunter2@host/v1", "endpoints.e.base_url has a name"),
        ("endpoints.e.base_url=https://host/v1?api_key=hunter2", "keys don't go into files"),
        ("endpoints.e.base_url=https://user:hunter2@host:x/v1", "endpoints.e.base_url has a name"),
        ("endpoints.e.proxy=http://user:hunter2@host", "endpoints.e.proxy has a name"),
        ("endpoints.e.base_url=ftp://host/v1", "wanted http"),
        ("endpoints.e.base_url=http://:80/v1", "wanted http"),
        ("endpoints.e.base_url=http://host:80x/v1", "wanted http"),
        ("endpoints.e.base_url=${oc.env:AVAR_NOT_THERE}", "AVAR_NOT_THERE"),
        ("stages.reason.sampling.stream=true", "sampling.stream: "),
        ("stages.reason.sampling.n=4", "sampling.n: "),
        ("stages.reason.sampling.messages=[]", "sampling.messages: "),
        ("stages.reason.sampling.model=other", "sampling.model: "),
        ("stages.reason.sampling.extra_body={top_k: 3}", "right below sampling"),
        ("stages.reason.sampling.extra_headers.x-api-key=hunter2", "keys don't go into files"),
        ("stages.reason.sampling.seed=3", "sampling has seed"),
        ("budget.cost=3", "no stage has a price"),
    ],
)
def test_settings_that_cannot_work_are_told_in_a_line_that_shows_no_key(folder, override, words):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")) as error:
        folder(1, "http://127.0.0.1:9/v1", override)
    assert "hunter2" not in str(error.value) and "\n" not in str(error.value)


def test_a_servers_own_sampling_is_sent_as_it_stands(serve, folder):
    url, seen = serve(completion())
    config, out = folder(1, url, "stages.reason.sampling={top_k: 3, temperature: 0.5}")
    run(config, out)
    (body,) = [body for body in seen if "top_k" in body]
    assert (body["top_k"], body["temperature"], body["model"]) == (3, 0.5, "m") and body["seed"] >= 0
