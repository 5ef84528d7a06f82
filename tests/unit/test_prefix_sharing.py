"""Which requests share blocks of the prefix cache: vLLM's own hashes, once the connector has seen the requests."""

import itertools

import pytest
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from verl_avar.roles import ChatTokens
from verl_avar.rollout.connector import VisualAttentionConnector
from verl_avar.rollout.options import RequestOptions

BLOCK = 16
START, END, NEWLINE, IMAGE = 1, 2, 3, 9
HEADERS = {"system": (4,), "user": (5,), "assistant": (6,), "tool": (7,)}
ANSWER = [START, 6, NEWLINE]


def _turn(name: str, words: int, word: int = 20) -> list[int]:
    return [START, *HEADERS[name], NEWLINE, *[word] * words, END]


@pytest.fixture
def connector():
    """Its scheduler side, without an engine."""
    connector = object.__new__(VisualAttentionConnector)
    connector._defaults = RequestOptions()
    connector._chat = ChatTokens(START, END, HEADERS, NEWLINE, visual=frozenset({IMAGE}))
    connector._requests = {}
    return connector


@pytest.fixture
def send(connector):
    init_none_hash(sha256)
    hasher, numbers = get_request_block_hasher(BLOCK, sha256), itertools.count()

    def send(ids, salt=None, **options):
        params = SamplingParams(extra_args=options, max_tokens=64)
        request = Request(str(next(numbers)), ids, params, None, cache_salt=salt, block_hasher=hasher)
        connector.on_new_request(request)
        return request, connector._requests[request.request_id]

    return send


def _shared(one, other) -> int:
    """How many blocks two sent requests have in common."""
    pairs = zip(one[0].block_hashes, other[0].block_hashes, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _respond(sent, tokens):
    sent[0].append_output_token_ids(tokens)
    return sent


def test_requests_of_one_system_prompt_share_it(send):
    system = _turn("system", 40)
    one, other = (send(system + _turn("user", 5, word) + ANSWER) for word in (21, 22))
    assert _shared(one, other) == len(system) // BLOCK


def test_a_conversation_shares_the_answer_that_it_goes_on_from(send):
    first = _turn("system", 20) + _turn("user", 5) + ANSWER
    one = _respond(send(first), [30] * 32)
    other = send(first + [30] * 32 + [END] + _turn("user", 5) + ANSWER)
    assert _shared(one, other) == (len(first) + 32) // BLOCK


def test_a_response_within_an_open_system_turn_is_not_shared_with_the_whole_turn(send):
    start = _turn("system", 20)[:-1]
    one = _respond(send(start), [20] * 41)
    other = send(start + [20] * 40 + [END] + _turn("user", 5) + ANSWER)
    assert _shared(one, other) == 0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        # The start of the second turn ends a block, its name is in the next one.
        (_turn("system", 11) + _turn("user", 20), _turn("system", 11) + _turn("system", 20) + _turn("user", 5)),
        # What comes before the system turn is the system's.
        ([20] * 32 + _turn("system", 5) + _turn("user", 5), [20] * 32 + _turn("user", 5)),
    ],
)
def test_blocks_whose_roles_a_later_turn_decides_are_not_shared(send, one, other):
    assert one[:BLOCK] == other[:BLOCK]
    one, other = send(one + ANSWER), send(other + ANSWER)
    assert (one[1].roles[:BLOCK] != other[1].roles[:BLOCK]).any()
    assert _shared(one, other) == 0


def test_equal_biases_share_and_others_do_not(send):
    prompt = _turn("system", 40) + _turn("user", 5) + ANSWER
    plain, biased, again = send(prompt), send(prompt, visual_bias=1.0), send(prompt, visual_bias=1)
    assert _shared(biased, again) == len(prompt) // BLOCK
    assert _shared(plain, biased) == 0


def test_prompts_without_roles_share_among_themselves_only(send):
    prompt = [20] * 40
    unscored, again = send(prompt), send(prompt)
    assert unscored[1].no_score
    assert _shared(unscored, again) == 2
    assert _shared(unscored, send(_turn("system", 36))) == 0


@pytest.mark.parametrize("mine", [{}, {"visual_bias": 1.0}])
def test_a_clients_salt_cannot_read_like_one_of_ours(send, mine):
    prompt = _turn("system", 40) + _turn("user", 5) + ANSWER
    target = send(prompt, salt="x", **mine)
    assert _shared(target, send(prompt, salt="x", **mine)) == len(prompt) // BLOCK
    for salt in ("x" + RequestOptions(visual_bias=1.0).cache_salt, target[0].cache_salt):
        assert _shared(target, send(prompt, salt=salt)) == 0
