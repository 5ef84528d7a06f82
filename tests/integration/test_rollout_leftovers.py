"""Two servers on one machine under one engine_id, and servers that are killed: no score is another's, nothing stays."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from rollouts import Eager, same_score, wanted_score
from servers import SHARED, Server
from traffic import Answer, Ask, one_by_one, scored_asks, write_miniature

from verl_avar.rollout import kv_transfer_config

FLAGS = ("--max-model-len", "320", "--kv-cache-memory-bytes", "32M")
CONFIG = kv_transfer_config() | {"engine_id": "same"}  # as two copies of one start script have it
TOLERANCE = 1e-4
CLIENTS = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tmp_path_factory.mktemp("miniature")


@pytest.fixture(scope="module")
def ban(checkpoint):
    return write_miniature(checkpoint)


@pytest.fixture(scope="module")
def check(checkpoint, ban):
    """check(answers): their scores are those of eager attention over their tokens."""
    eager = Eager(checkpoint)

    def check(answers: list[Answer]) -> None:
        for answer in answers:
            masses = eager(answer.ask.prompt, answer.ask.bias, answer.output)[1]
            same_score(answer.score, wanted_score(masses), TOLERANCE)

    return check


@pytest.fixture(scope="module")
def pair(checkpoint, ban, tmp_path_factory):
    """Two servers that start at the same time."""
    folder = tmp_path_factory.mktemp("servers")
    with (
        Server(checkpoint, folder, *FLAGS, config=CONFIG) as first,
        Server(checkpoint, folder, *FLAGS, config=CONFIG) as second,
    ):
        yield first.wait(), second.wait()


def named_score_files():
    return [path for path in SHARED.iterdir() if path.name.startswith(("avar-scores-", "avar-new-"))]


def test_two_servers_of_one_engine_id_keep_their_own_scores(pair, check, ban):
    """Both answer at the same time, other requests each, in the same slots."""
    asks = scored_asks()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(one_by_one, pair[0].url, asks[::2], ban)
        second = pool.submit(one_by_one, pair[1].url, asks[1::2], ban)
        check(first.result() + second.result())
    scores = [{name for name in server.look() if name.startswith("avar-scores-")} for server in pair]
    assert all(len(names) == 1 for names in scores)
    assert not named_score_files()


def test_a_killed_server_leaves_no_scores_and_starts_again(pair, check, checkpoint, ban, tmp_path):
    """SIGKILL in the middle of an answer, of its worker and then of all its processes. The other server, of the same
    engine_id, doesn't notice."""
    first, second = pair
    with _killed_while_it_answers(first, lambda: [first.process("worker")], ban) as port:
        check(one_by_one(second.url, scored_asks()[:4], ban))
    with Server(checkpoint, tmp_path, *FLAGS, config=CONFIG, port=port) as again:
        check(one_by_one(again.wait().url, scored_asks()[:4], ban))
        with _killed_while_it_answers(again, again.processes, ban):
            check(one_by_one(second.url, scored_asks()[:4], ban))
    with Server(checkpoint, tmp_path, *FLAGS, config=CONFIG, port=port) as again:
        check(one_by_one(again.wait().url, scored_asks()[:4], ban))
        assert again.stop() == 0
        assert not again.left_files()
    assert second.stop() == 0
    assert not second.left_files()


@contextmanager
def _killed_while_it_answers(server, victims, ban):
    """Kills the victims; the rest ends by itself. Yields the server's port."""
    endless = [Ask("Describe the image.", (0,), max_tokens=200)] * 10_000
    with server, ThreadPoolExecutor(CLIENTS) as pool:
        answers = [pool.submit(one_by_one, server.url, endless, ban) for _ in range(CLIENTS)]
        while not server.metrics()["vllm:num_requests_running"]:
            assert not any(answer.done() for answer in answers)
        server.kill(*victims())
        for answer in answers:
            with pytest.raises((httpx.TransportError, AssertionError)):  # the connection breaks, or the status is 500
                answer.result()
        server.await_end()
        assert not [path for path in server.left_files() if path.name.startswith("avar")]
        assert not named_score_files()
        yield server.port
