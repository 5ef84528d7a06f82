"""The exact teacher: three rules that write the miniature's chains, and its endpoint with the faults asked for."""

import asyncio
import io
import json
import math
import random
import subprocess
import sys
import time
from collections import Counter

import httpx
import openai
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from verl_avar.data.schema import ROWS, content_id
from verl_avar.errors import ConfigError
from verl_avar.evaluation.scoring import judge
from verl_avar.miniature import data, teacher, teacher_endpoint, teacher_faults
from verl_avar.miniature.tasks import TASKS, draw_sample
from verl_avar.miniature.teacher_endpoint import Endpoint, Settings
from verl_avar.miniature.teacher_faults import Bucket, Faults
from verl_avar.miniature.teacher_server import Teacher
from verl_avar.synthesis.outcomes import STAGES
from verl_avar.synthesis.prompt import render

MODELS = dict(zip(STAGES, teacher_endpoint.STAGES, strict=True))
URL = "/v1/chat/completions"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Twenty questions, and the conversations they were drawn for."""
    folder = tmp_path_factory.mktemp("questions")
    questions = pq.read_table(data.write_questions(folder / "questions.parquet", 20, seed=3))
    return questions, pq.read_table(data.write_sft(folder / "sft.parquet", 20, seed=3)).to_pylist()


@pytest.fixture(scope="module")
def server():
    with Teacher() as server:
        yield server


def body(row: dict, stage: str, images: bool | None = None, seed: int | None = None, **texts: str) -> dict:
    """A request as a run would send it, with the prompts that ship."""
    context = {"question": row["question"].replace("<image>", ""), "answer": row["answer"], "choices": [], "images": 1}
    files = [image["bytes"] for image in row["images"]]
    with_images = stage == "describe" if images is None else images
    messages = render(None, stage, context | texts, files if with_images else None)
    return {"model": MODELS[stage], "messages": messages, "seed": seed}


def in_process(settings: Settings) -> httpx.AsyncClient:
    """A client of the endpoint without a server between."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(Endpoint(settings).app()), base_url="http://teacher")


def posted(settings: Settings, bodies: list[dict]) -> tuple[list[httpx.Response], dict]:
    """One response after the other, and the counts afterwards."""

    async def run():
        async with in_process(settings) as client:
            responses = [await client.post(URL, json=given) for given in bodies]
            return responses, (await client.get("/stats")).json()

    return asyncio.run(run())


def text_of(response: httpx.Response) -> str:
    return response.raise_for_status().json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("task", TASKS)
def test_the_three_stages_write_exactly_the_chains_of_the_tasks(task):
    rng = random.Random(11)
    for _ in range(300):
        sample = draw_sample(task, rng.choice(("train", "eval")), rng)
        chain = teacher.reason(teacher.describe(sample.scene), sample.question)
        assert teacher.anchor(chain) == sample.response
        assert "description" in chain and judge(chain, sample.answer).right


def test_worked_example():
    description = teacher.describe("0:circle:red|4:cross:blue")
    assert description == "circle red top left, cross blue middle centre"
    chain = teacher.reason(description, "How many crosses are there?")
    assert chain == (
        "<think>The description says circle red top left, cross blue middle centre. Checking the description again, "
        "it says cross blue middle centre, which makes 1.</think><answer>1</answer>"
    )
    assert teacher.reason("nothing", "How many red objects are there?").endswith(
        "it says nothing, which makes 0.</think><answer>0</answer>"
    )
    assert teacher.anchor(chain) == (
        "<think>I see circle red top left, cross blue middle centre. Looking at the image again, I see cross blue "
        "middle centre, which makes 1.</think><answer>1</answer>"
    )
    assert teacher.anchor("No appeal at all.") == "No appeal at all."


@pytest.mark.parametrize("task", TASKS)
def test_a_mistake_is_always_a_wrong_answer_that_its_chain_leads_to(task):
    rng = random.Random(12)
    for _ in range(100):
        sample = draw_sample(task, "train", rng)
        chain = teacher.reason(teacher.describe(sample.scene), sample.question, mistake=rng)
        judged = judge(chain, sample.answer)
        assert judged.well_formed and not judged.right
        assert judged.answer in chain.split("it says ")[1].split("</think>")[0]


def test_one_appeal_survives_a_leak_now_this_one_now_the_other():
    chain = teacher.reason("digit 7", "Which digit is written?")
    leaked = Counter(teacher.anchor(chain, leak=random.Random(seed)) for seed in range(100))
    assert set(leaked) == {
        "<think>The description says digit 7. Looking at the image again, I see digit 7.</think><answer>7</answer>",
        "<think>I see digit 7. Checking the description again, it says digit 7.</think><answer>7</answer>",
    }
    assert min(leaked.values()) > 30


@pytest.mark.parametrize(
    ("description", "question", "message"),
    [
        ("A nice picture.", "What colour is the cross?", "not of the miniature's shapes"),
        ("circle red top left", "What colour is the cross?", "0 objects that are 'cross'"),
        ("cross red top left, cross blue top centre", "What colour is the cross?", "2 objects"),
        ("circle red top left", "How many stars are there?", "not one of the miniature's questions"),
        ("circle red top left", "Which digit is written?", "names no digit"),
    ],
)
def test_what_the_reasoner_cannot_settle_is_an_error(description, question, message):
    with pytest.raises(teacher.CannotAnswer, match=message):
        teacher.reason(description, question)


@pytest.mark.parametrize(
    "scene", ["", "digit:x", "digit:99999", "0:star:red", "9:cross:red", "1:cross:red|0:cross:red"]
)
def test_what_is_no_scene_is_not_described(scene):
    with pytest.raises(teacher.CannotAnswer, match="is not a scene"):
        teacher.describe(scene)


def test_questions_are_those_of_the_conversations_with_the_same_pixels(rows):
    table, conversations = rows
    assert table.schema.equals(ROWS)
    for index, (row, sft) in enumerate(zip(table.to_pylist(), conversations, strict=True)):
        (image,), (picture,) = row["images"], sft["images"]
        assert row["question"] == sft["messages"][1]["content"] and row["answer"] == sft["answer"]
        assert json.loads(row["meta"]) == {"task": sft["task"], "scene": sft["scene"]}
        assert Image.open(io.BytesIO(image["bytes"])).tobytes() == Image.open(io.BytesIO(picture["bytes"])).tobytes()
        assert teacher.read_scene(image["bytes"]) == sft["scene"]
        assert row["id"] == content_id(row["question"], row["answer"], row["choices"], [image["bytes"]])
        assert (row["source"], row["source_row"], row["choices"]) == ("miniature", index, [])


def test_shipped_prompts_through_the_endpoint_give_the_conversations(rows, server):
    """Over real HTTP, with the client that runs use."""

    async def chain_of(client: openai.AsyncOpenAI, row: dict) -> str:
        async def ask(stage: str, **texts: str) -> str:
            completion = await client.chat.completions.create(**body(row, stage, seed=1, **texts))
            assert completion.choices[0].finish_reason == "stop"
            assert completion.usage.completion_tokens == len(completion.choices[0].message.content.split())
            return completion.choices[0].message.content

        description = await ask("describe")
        chain = await ask("reason", description=description)
        return await ask("anchor", description=description, chain=chain)

    async def run(questions: list[dict]) -> tuple[list[str], list[str]]:
        http = httpx.AsyncClient(trust_env=False)
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", http_client=http, max_retries=0) as client:
            models = [model.id async for model in client.models.list()]
            return models, await asyncio.gather(*(chain_of(client, row) for row in questions))

    table, conversations = rows
    models, chains = asyncio.run(run(table.to_pylist()))
    assert models == ["scene-describer", "scene-reasoner", "scene-anchorer"]
    assert chains == [sft["messages"][2]["content"] for sft in conversations]
    stats = server.stats()
    assert stats["responses"] == {"ok": 60} and stats["texts"] == {"exact": 60}
    assert stats["requests"] == dict.fromkeys(STAGES, 20)
    assert stats["with_images"] == {"scene-describer": 20, "scene-reasoner": 0, "scene-anchorer": 0}
    assert 0 < stats["last"] - stats["first"] < 60


def test_images_that_other_stages_are_sent_are_counted(rows):
    row = rows[0].to_pylist()[0]
    description = teacher.describe(json.loads(row["meta"])["scene"])
    plain, seeing = (body(row, "reason", images=images, description=description) for images in (False, True))
    responses, stats = posted(Settings(), [plain, seeing])
    assert text_of(responses[0]) == text_of(responses[1])
    assert stats["with_images"] == {"scene-reasoner": 1} and stats["requests"] == {"reason": 2}


def test_what_it_does_not_know_is_a_400_that_says_what(rows):
    row = rows[0].to_pylist()[0]
    blank = io.BytesIO()
    Image.new("RGB", (84, 84)).save(blank, "PNG")
    ask = body(row, "describe")
    web = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]}
    cases = {
        "has no 'scene'": body(row | {"images": [{"bytes": blank.getvalue()}]}, "describe"),
        "no picture that can be read": body(row | {"images": [{"bytes": b"\x89PNG\r\n\x1a\n"}]}, "describe"),
        "describes one image; the request has 0": body(row, "describe", images=False),
        "nor n is supported": ask | {"n": 2},
        "neither stream": ask | {"stream": True},
        "no model 'gpt'": ask | {"model": "gpt"},
        "KeyError: 'messages'": {"model": "scene-describer"},
        "TypeError": ask | {"messages": 3},
        "nothing is fetched": ask | {"messages": [web]},
        "<description>…</description>": ask | {"model": "scene-reasoner"},
    }
    responses, stats = posted(Settings(), list(cases.values()))
    for message, response in zip(cases, responses, strict=True):
        assert response.status_code == 400 and message in response.json()["error"]["message"]
    assert stats["responses"] == {"bad_request": len(cases)}


def test_a_text_ends_after_max_tokens_words(rows):
    row = rows[0].to_pylist()[0]
    (whole, cut), _ = posted(Settings(), [body(row, "describe"), body(row, "describe") | {"max_tokens": 1}])
    assert text_of(cut) == text_of(whole).split()[0]
    choice, usage = cut.json()["choices"][0], cut.json()["usage"]
    assert choice["finish_reason"] == "length" and usage["completion_tokens"] == 1
    assert usage["total_tokens"] == usage["prompt_tokens"] + 1


def test_the_key_is_asked_for_and_echoed_where_it_is_wrong(rows):
    async def run():
        async with in_process(Settings(api_key="right")) as client:
            given = body(rows[0].to_pylist()[0], "describe")
            keys = ({}, {"Authorization": "Bearer sk-wrong"}, {"Authorization": "Bearer right"})
            return [await client.post(URL, json=given, headers=key) for key in keys]

    none, wrong, right = asyncio.run(run())
    assert (none.status_code, wrong.status_code, right.status_code) == (401, 401, 200)
    assert "sk-wrong" in wrong.json()["error"]["message"] and "right" not in none.text


def test_content_faults_hang_on_the_request_and_its_seed(rows):
    """The same request has the same text; over seeds, each fault is as frequent as it is asked to be."""
    row = rows[0].to_pylist()[0]
    description = teacher.describe(json.loads(row["meta"])["scene"])
    chain = teacher.reason(description, row["question"].removeprefix("<image>"))
    settings = Settings(Faults({"wrong_answer": 0.2, "leak": 0.3, "refusal": 0.1}))
    texts = {"description": description, "chain": chain}
    exact = {"describe": description, "reason": chain, "anchor": teacher.anchor(chain)}
    expected = {
        "describe": {"refusal": 0.1},
        "reason": {"refusal": 0.1, "wrong_answer": 0.2},
        "anchor": {"refusal": 0.1, "leak": 0.3},
    }
    for stage in STAGES:
        bodies = [body(row, stage, seed=seed, **texts) for seed in range(300)]
        first, stats = posted(settings, bodies)
        again, _ = posted(settings, bodies)
        assert [text_of(response) for response in first] == [text_of(response) for response in again]
        assert sum(text_of(response) == exact[stage] for response in first) == stats["texts"].pop("exact")
        assert stats["responses"] == {"ok": 300} and set(stats["texts"]) == set(expected[stage])
        for kind, count in stats["texts"].items():
            assert count / 300 == pytest.approx(expected[stage][kind], abs=0.1)


def test_transport_faults_are_drawn_anew_for_a_retry(rows):
    rates = {"rate_limit": 0.2, "server_error": 0.2, "timeout": 0.2, "malformed": 0.2}
    settings = Settings(Faults(rates), hold_s=0.001)
    same = [body(rows[0].to_pylist()[0], "describe")] * 300
    responses, stats = posted(settings, same)
    kinds = {429: "rate_limit", 500: "server_error", 504: "timeout"}
    seen = Counter(
        kinds.get(response.status_code) or ("ok" if _reads(response) else "malformed") for response in responses
    )
    assert seen == stats["responses"] and set(seen) == {*rates, "ok"}
    assert all(count / 300 == pytest.approx(0.2, abs=0.1) for count in seen.values())
    assert all(response.headers["retry-after"] == "1" for response in responses if response.status_code == 429)
    assert posted(settings, same)[1]["responses"] == stats["responses"], "the same seed draws the same faults"


def _reads(response: httpx.Response) -> bool:
    try:
        return bool(response.json())
    except json.JSONDecodeError:
        return False


def test_a_cut_connection_ends_within_the_body_and_a_slow_answer_comes_late(rows):
    given = body(rows[0].to_pylist()[0], "describe")
    with Teacher(faults={"cut": 1.0}) as cutting, Teacher(faults={"slow": 1.0}, slow_s=0.5) as slow:
        with httpx.Client(trust_env=False) as client:
            with pytest.raises(httpx.RemoteProtocolError, match="without sending complete message body"):
                client.post(cutting.url + "/chat/completions", json=given)
            begin = time.monotonic()
            assert text_of(client.post(slow.url + "/chat/completions", json=given))
            assert time.monotonic() - begin >= 0.5
        assert cutting.stats()["responses"] == {"cut": 1} and cutting.stats()["texts"] == {}
        assert slow.stats()["responses"] == {"slow": 1} and slow.stats()["texts"] == {"exact": 1}


def test_a_bucket_worked_by_hand():
    bucket = Bucket(120)  # two a second
    assert [bucket.take(10.0) for _ in range(3)] == [0, 0, 0.5]
    assert bucket.take(10.25) == pytest.approx(0.25)
    assert bucket.take(10.5) == 0
    assert [bucket.take(99.0) for _ in range(3)] == [0, 0, 0.5], "no more than a second's worth is saved up"
    assert [Bucket(6).take(0.0), Bucket(6).capacity] == [0, 1]


def test_above_the_stated_rate_requests_are_refused_with_when_to_come_back(rows):
    given = body(rows[0].to_pylist()[0], "describe")
    responses, stats = posted(Settings(requests_per_minute=6), [given] * 3)
    assert [response.status_code for response in responses] == [200, 429, 429]
    assert stats["responses"] == {"ok": 1, "limited": 2}
    assert all(response.headers["x-ratelimit-limit-requests"] == "6" for response in responses)
    for response in responses[1:]:
        seconds = int(response.headers["retry-after-ms"]) / 1000
        assert 0 < seconds <= 10 and int(response.headers["retry-after"]) == math.ceil(seconds)


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ("cut", "'cut' is not KIND=PROBABILITY"),
        ("cut=a", "'cut=a' is not KIND=PROBABILITY"),
        ("fire=0.1", "unknown fault 'fire'"),
        ("cut=1.5", "wanted 0 to 1"),
        ("cut=nan", "wanted 0 to 1"),
        ("cut=0.6,slow=0.5", "add up to 1.1"),
    ],
)
def test_faults_that_cannot_be_are_one_line(faults, message):
    with pytest.raises(ConfigError, match=message):
        teacher_faults.parse(faults)
    assert teacher_faults.parse("cut=0.1, leak=0.9,wrong_answer=0.9").rates["leak"] == 0.9


def test_the_server_writes_its_port_and_ends_with_its_parent(tmp_path):
    port_file = tmp_path / "port"
    code = (
        "import sys, time; from verl_avar.miniature.teacher_server import Teacher\n"
        f"server = Teacher(port_file={str(port_file)!r}).__enter__()\n"
        "print(server.process.pid, server.url, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        pid, url = parent.stdout.readline().split()
        child = psutil.Process(int(pid))
        assert url == f"http://127.0.0.1:{port_file.read_text()}/v1"
        addresses = {connection.laddr.ip for connection in child.net_connections() if connection.status == "LISTEN"}
        assert addresses == {"127.0.0.1"}
    finally:
        parent.kill()
        parent.wait()
    assert psutil.wait_procs([child], timeout=5)[1] == []


def test_a_server_that_cannot_start_says_so(capfd):
    with pytest.raises(RuntimeError, match="exit status 2"), Teacher(faults={"fire": 1.0}):
        pass
    assert "unknown fault 'fire'" in capfd.readouterr().err
