"""`avar serve` as its documentation starts it, asked over HTTP: scores, biases, refusals; the examples as printed."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from rollouts import Eager, wanted_score
from servers import Server
from traffic import Ask, Crowd, all_at_once, one_by_one

from verl_avar.miniature import base_path

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "verl_avar" / "rollout" / "SERVING.md").read_text(encoding="utf-8")
START, CLIENT, CURL = re.findall(r"```sh\n(.*?)```", DOCUMENT, re.DOTALL)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ASK = Ask("What colour is the triangle?", (0,))
ASKS = [replace(ASK, bias=bias) for bias in ((0.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.5, -0.5))]
ASKS += [Ask("What is where?", (1, 2), bias=(0.3, 0.0)), Ask("Hello?", bias=(0.0, -0.5))]
FIGURES = ("ratio", "share", "visual_mass", "system_mass", "vas")


class PrintedServer(Server):
    """The server that a printed command starts, on a free port."""

    def __init__(self, command: str, folder: Path):
        command = command.replace("8010", "{port}").replace(".venv/bin/", f"{Path(sys.executable).parent}/")
        self._start(["bash", "-c", f"exec {command}"], folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with PrintedServer(START, tmp_path_factory.mktemp("server")) as printed:
        yield printed.wait()
        assert printed.stop() == 0


@pytest.fixture(scope="module")
def post(server):
    """post(path, body, status=200) -> the answer's JSON; the lines of a stream where the body asks for one. A body may
    be raw text."""
    with httpx.Client(base_url=server.url, timeout=120) as client:

        def send(path, body, status=200):
            text = body if isinstance(body, str) else json.dumps(body)
            reply = client.post(path, content=text, headers={"Content-Type": "application/json"})
            assert reply.status_code == status, reply.text
            if "event-stream" not in reply.headers["content-type"]:
                return reply.json()
            lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: {")]
            return [json.loads(line) for line in lines]

        yield send


@pytest.fixture(scope="module")
def alone(server):
    return one_by_one(server.url, ASKS)


@pytest.fixture(scope="module")
def eager():
    return Eager(base_path())


def score_of(answer):
    return answer["kv_transfer_params"]["visual_attention"]


def figures(score, tokens=True):
    return [score[name] for name in FIGURES] + [score["n"]] + (score["tokens"] if tokens else [])


def close_to(score, tokens=True):
    return pytest.approx(figures(score, tokens), rel=1e-4, abs=1e-5)


def test_scores_equal_eager_attention_over_the_answers_tokens(alone, eager):
    for answer in alone:
        _, masses = eager(answer.ask.prompt, answer.ask.bias, answer.output)
        assert figures(answer.score) == close_to(wanted_score(masses))


def test_requests_at_the_same_time_and_beside_bad_ones_have_the_answers_they_have_alone(server, alone):
    bad = [(CHAT, ASK.body(vllm_xargs={"visual_bias": 99})), (CHAT, ASK.body(max_tokens=-1))]
    crowd: Crowd = all_at_once(server.url, ASKS, leavers=[ASK] * 4, bad=bad * 3, ban=(), seed=0)
    assert crowd.refused == [400] * 6
    answers = {answer.ask: answer for answer in crowd.answers}
    for single in alone:
        assert answers[single.ask].ids == single.ids
        assert figures(answers[single.ask].score) == close_to(single.score)


@pytest.mark.parametrize(
    ("xargs", "complaint"),
    [
        ('{"visual_bais": 1}', "unknown option 'visual_bais'"),
        ('{"visual_bias": NaN}', "visual_bias must be finite and within ±20, got nan"),
        ('{"visual_bias": 1e999}', "visual_bias must be finite and within ±20, got inf"),
        ('{"visual_bias": -1e308}', "visual_bias must be finite"),
        ('{"visual_bias": 1%s}' % ("0" * 400), "visual_bias must be finite"),
        ('{"system_bias": "NaN"}', "system_bias must be a number, got 'NaN'"),
        ('{"system_bias": true}', "system_bias must be a number, got True"),
        ('{"system_bias": null}', "system_bias must be a number, got None"),
        ('{"system_bias": [0.5]}', "system_bias must be a number"),
        ('{"system_bias": {"a": 1}}', "system_bias must be a number"),
        ('{"attention_scores": "maps"}', "attention_scores must be one of summary, tokens"),
        ('{"attention_scores": 1}', "attention_scores must be one of"),
        ('{"attention_layers": [0]}', "attention_layers is engine-wide"),
        ("[]", "Input should be a valid dictionary"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_options_are_a_400_with_one_reason(post, xargs, complaint, stream):
    body = json.dumps(ASK.body(stream=stream, vllm_xargs="HERE")).replace('"HERE"', xargs)
    error = post(CHAT, body, status=400)["error"]
    assert complaint in error["message"] and error["code"] == 400


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"visual_bias": 1.0}, "visual_bias: options of visual attention belong in vllm_xargs"),
        ({"stop": ["."], "vllm_xargs": {"attention_scores": "summary"}}, "give stop_token_ids"),
        ({"use_beam_search": True, "n": 2, "vllm_xargs": {"visual_bias": 1.0}}, "beam search takes no options"),
    ],
)
def test_options_that_would_be_lost_are_a_400(post, changes, complaint):
    assert complaint in post(CHAT, ASK.body(**changes), status=400)["error"]["message"]
    completion = replace(ASK, system=None).body(**changes)
    assert complaint in post(COMPLETIONS, completion, status=400)["error"]["message"]


def test_a_bias_without_roles_is_a_400_and_on_a_stream_an_error_event(post):
    body = Ask("no chat at all", system=None, bias=(1.0, 0.0)).body()
    assert "no turn starts" in post(COMPLETIONS, body, status=400)["error"]["message"]
    (event,) = post(COMPLETIONS, body | {"stream": True})
    assert event["error"]["code"] == 400 and "no turn starts" in event["error"]["message"]


def test_text_only_and_roleless_prompts_have_defined_scores(post):
    text = score_of(post(CHAT, Ask("Hello?").body(vllm_xargs={})))
    assert (text["ratio"], text["share"], text["visual_mass"], text["vas"]) == (0.0, 0.0, 0.0, 0.0)
    assert text["system_mass"] > 0 and "tokens" not in text
    unread = score_of(post(COMPLETIONS, Ask("no chat at all", system=None).body()))
    assert [unread[name] for name in FIGURES] == [None] * 5 and "no turn starts" in unread["reason"]


def test_keys_of_other_plugins_do_no_harm(post, alone):
    options = {"attention_scores": "tokens", "bias": 99, "other": "x", "kv_transfer_params": "y"}
    assert figures(score_of(post(CHAT, ASK.body(vllm_xargs=options)))) == close_to(alone[0].score)


def test_a_stream_has_the_score_in_the_chunk_that_ends_it(post, alone):
    for answer in alone[:2]:
        chunks = post(CHAT, answer.ask.body(stream=True, stream_options={"include_usage": True}))
        (scored,) = (chunk for chunk in chunks if chunk.get("kv_transfer_params"))
        assert scored["choices"][0]["finish_reason"] == "length"
        assert figures(score_of(scored)) == close_to(answer.score)
        assert chunks[-1]["usage"]["completion_tokens"] == len(answer.ids) and chunks[-1]["choices"] == []


def test_a_client_that_leaves_a_stream_ends_its_request(server):
    def generated():
        return server.metrics()["vllm:generation_tokens_total"]

    before, asked = generated(), 400
    with httpx.stream("POST", f"{server.url}{CHAT}", json=ASK.body(stream=True, max_tokens=asked)) as reply:
        assert next(line for line in reply.iter_lines() if "finish_reason" in line)
    last = -1
    while (now := generated()) != last:  # until nothing is generated any more
        last = now
        time.sleep(1)
    assert 0 < now - before < asked


def test_every_choice_of_one_prompt_has_its_own_score(post, eager):
    answer = post(CHAT, ASK.body(n=3, temperature=1.5, seed=1))
    scores = score_of(answer)
    assert len({tuple(choice["token_ids"]) for choice in answer["choices"]}) > 1
    for choice, score in zip(answer["choices"], scores, strict=True):
        outputs = [SimpleNamespace(token_ids=choice["token_ids"])]
        output = SimpleNamespace(prompt_token_ids=answer["prompt_token_ids"], outputs=outputs)
        assert figures(score) == close_to(wanted_score(eager(ASK.prompt, ASK.bias, output)[1]))
    chunks = post(CHAT, ASK.body(n=3, temperature=1.5, seed=1, stream=True))
    streamed = {chunk["choices"][0]["index"]: score_of(chunk) for chunk in chunks if chunk.get("kv_transfer_params")}
    assert [figures(streamed[i]) for i in range(3)] == [close_to(score) for score in scores]


def test_every_prompt_of_one_completion_has_its_own_score(post):
    prompts = [replace(ASK, images=(), system=system).prompt["prompt"] for system in ("Be brief.", "Look twice.")]
    body = Ask("", system=None).body()
    singles = [score_of(post(COMPLETIONS, body | {"prompt": prompt})) for prompt in prompts]
    assert singles[0]["system_mass"] != pytest.approx(singles[1]["system_mass"], rel=1e-3)
    together = score_of(post(COMPLETIONS, body | {"prompt": prompts}))
    assert [figures(score) for score in together] == [close_to(score) for score in singles]
    chunks = post(COMPLETIONS, body | {"prompt": prompts, "stream": True})
    streamed = {chunk["choices"][0]["index"]: score_of(chunk) for chunk in chunks if chunk.get("kv_transfer_params")}
    assert [figures(streamed[i]) for i in (0, 1)] == [close_to(score) for score in singles]


def test_a_batch_of_chats_has_a_score_each(post, alone):
    bodies = [ask.body(vllm_xargs=ASKS[1].body()["vllm_xargs"]) for ask in (ASKS[1], Ask("Hello?"))]
    answer = post(f"{CHAT}/batch", bodies[0] | {"messages": [body["messages"] for body in bodies]})
    image, text = score_of(answer)
    assert figures(image) == close_to(alone[1].score)
    assert text["visual_mass"] == 0.0 and text["system_mass"] > 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"stop": ["e", "a", "r", "<"]}, "finds stop strings outside of the engine"),
        ({"use_beam_search": True, "n": 2, "max_tokens": 3}, "beam search has no scores"),
    ],
)
def test_an_answer_without_score_says_why(post, changes, reason):
    answer = post(CHAT, ASK.body(**{"vllm_xargs": {}, **changes}))
    scores = score_of(answer) if changes.get("n") else [score_of(answer)]
    assert len(scores) == len(answer["choices"])
    for score in scores:
        assert [score[name] for name in FIGURES] == [None] * 5 and reason in score["reason"]


def test_a_stop_token_has_a_score(post, alone):
    body = ASK.body(stop_token_ids=[alone[0].ids[1]])
    score = score_of(post(CHAT, body))
    assert score["n"] == 2
    assert score["tokens"] == pytest.approx(alone[0].score["tokens"][:2], rel=1e-4)


def test_other_ways_in_have_scores_too(post):
    asked = {"model": "miniature", "input": "Hello?", "max_output_tokens": 4}
    asked["vllm_xargs"] = {"attention_scores": "tokens"}
    answer = post("/v1/responses", asked)
    assert len(score_of(answer)["tokens"]) == answer["usage"]["output_tokens"]
    *_, done = post("/v1/responses", asked | {"stream": True})
    assert done["type"] == "response.completed"
    assert len(score_of(done["response"])["tokens"]) == done["response"]["usage"]["output_tokens"]
    messages = [{"role": "user", "content": "Hello?"}]
    anthropic = post("/v1/messages", {"model": "miniature", "max_tokens": 4, "messages": messages})
    assert score_of(anthropic)["n"] == anthropic["usage"]["output_tokens"]
    sampling = {"max_tokens": 4, "ignore_eos": True, "extra_args": {"attention_scores": "tokens"}}
    ids = post("/tokenize", {"model": "miniature", "messages": messages})["tokens"]
    tokens = post("/inference/v1/generate", {"token_ids": ids, "sampling_params": sampling})
    assert len(score_of(tokens)["tokens"]) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"logprobs": True, "top_logprobs": 2},
        {"prompt_logprobs": 1},
        {"structured_outputs": {"regex": "<answer>(red|blue)</answer>"}, "ignore_eos": False},
        {"cache_salt": "theirs"},
        {"kv_transfer_params": {"do_remote_prefill": True, "remote_engine_id": "x", "remote_block_ids": [1]}},
        {"kv_transfer_params": {"visual_attention": "mine"}},
        {"seed": 3, "temperature": 1.0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_features_leave_scores_whole(post, eager, changes):
    answer = post(CHAT, ASK.body(**changes))
    (choice,) = answer["choices"]
    output = SimpleNamespace(
        prompt_token_ids=answer["prompt_token_ids"], outputs=[SimpleNamespace(token_ids=choice["token_ids"])]
    )
    assert figures(score_of(answer)) == close_to(wanted_score(eager(ASK.prompt, ASK.bias, output)[1]))


def test_the_examples_run_as_printed_and_print_what_the_documentation_says(server):
    def run(command):
        command = command.replace(".venv/bin/", f"{Path(sys.executable).parent}/").strip()
        done = subprocess.run(["bash", "-c", f"{command} {server.url}"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "examples/serve_openai_client.py" in CLIENT and "examples/serve_curl.sh" in CURL
    assert run(CLIENT) in DOCUMENT
    printed = json.loads("{" + re.search(r"```json\n(.*?),\n```", DOCUMENT, re.DOTALL)[1] + "}")
    assert figures(score_of(json.loads(run(CURL))), tokens=False) == close_to(score_of(printed), tokens=False)
