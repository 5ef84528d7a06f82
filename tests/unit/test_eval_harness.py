"""Drivers of VLMEvalKit and lmms-eval: the proxy between harness and server, commands, and reading what they wrote.

harness_samples/ has the first rows of what VLMEvalKit (e8e78f05) and lmms-eval 0.7.3 wrote for made-up answers.
"""

import asyncio
import base64
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from verl_avar.errors import ConfigError
from verl_avar.evaluation.benchmark.harness import lmms_eval, vlmevalkit
from verl_avar.evaluation.benchmark.harness.launch import HarnessFailed, environment, launch, members
from verl_avar.evaluation.benchmark.harness.proxy import Proxy, serving
from verl_avar.evaluation.benchmark.harness.reading import Verdict, agreement, match, result_rows
from verl_avar.evaluation.benchmark.harness.settings import (
    Benchmark,
    Endpoint,
    HarnessSettings,
    Protocol,
    harness_python,
)
from verl_avar.evaluation.benchmark.harness.shown import NO_ANSWER, shown
from verl_avar.evaluation.benchmark.schema import QUESTIONS, RESULTS

SAMPLES = Path(__file__).parent / "harness_samples"
CHAIN = "<think>Is it A? No, B.</think><answer>B</answer>"


def picture(colour: str, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 24), colour).save(file, form)
    return file.getvalue()


def question(number: int, text: str = "Which?", answer: str = "B", colour: str = "red") -> dict:
    return {
        "benchmark": "toy",
        "id": str(number),
        "question": text,
        "choices": ["red", "blue"],
        "answer": answer,
        "answer_type": "choice",
        "images": [{"bytes": picture(colour)}],
        "meta": "{}",
    }


def turn(text: str, colour: str = "red", form: str = "JPEG") -> list[dict]:
    """What a harness asks: one user turn, its image encoded anew."""
    url = f"data:image/{form.lower()};base64,{base64.b64encode(picture(colour, form)).decode()}"
    return [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}],
        }
    ]


class Upstream:
    """A server that answers what it is told to, and remembers what it was asked."""

    def __init__(self, answer=CHAIN, finish: str = "stop", status: int = 200):
        self.answer, self.finish, self.status, self.asked = answer, finish, status, []
        self.app = Starlette(routes=[Route("/v1/chat/completions", self.chat, methods=["POST"])])

    async def chat(self, request):
        body = await request.json()
        self.asked.append(body)
        await asyncio.sleep(0.02)
        if self.status == 200:
            text = self.answer(body) if callable(self.answer) else self.answer
            choice = {"index": 0, "finish_reason": self.finish, "message": {"content": text}}
            scores = {"visual_attention": {"ratio": 0.5, "vas": 2.0}}
            usage = {"prompt_tokens": 7, "completion_tokens": 3}
            return JSONResponse({"choices": [choice], "usage": usage, "kv_transfer_params": scores})
        if self.status == 418:
            return PlainTextResponse("no teapot", status_code=200)
        return JSONResponse({"error": {"message": "too many images"}}, status_code=self.status)


class Plain:
    """Any application, to be served by `serving`."""

    def __init__(self, app):
        self.app = app

    async def close(self) -> None:
        pass


@contextmanager
def served(upstream: Upstream, out: Path, protocol: Protocol | None = None, judge: bool = False, **more):
    """(proxy, its address) in front of an upstream server, which is its judge, too."""
    with serving(Plain(upstream.app)) as address:
        endpoint = Endpoint(f"{address}/v1", "model")
        judging = Endpoint(f"{address}/v1", "a judge") if judge else None
        proxy = Proxy(out, endpoint, protocol or Protocol(), judge=judging, **more)
        with serving(proxy) as front:
            yield proxy, front


def ask(front: str, messages: list[dict], route: str = "/v1", **more) -> httpx.Response:
    body = {"model": "x", "messages": messages, **more}
    return httpx.post(f"{front}{route}/chat/completions", json=body, timeout=20, trust_env=False)


def content(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("response", "finish", "part"),
    [
        (CHAIN, "stop", "B"),
        ("<think>Perhaps <answer>A</answer></think><answer> (B) 5 cm </answer>", "stop", "(B) 5 cm"),
        ("<think>A or", "length", NO_ANSWER),
        ("<think>A or", "stop", NO_ANSWER),
        ("<think>A</think>So B.", "stop", "So B."),
        ("<think>A</think>So", "length", NO_ANSWER),
        ("<think>A</think><answer>B", "stop", "B"),
        ("<answer>B</answer> and then on and", "length", "B"),
        ("B", "stop", "B"),
        ("<answer> </answer>", "stop", NO_ANSWER),
        ("", "stop", NO_ANSWER),
    ],
)
def test_what_our_rules_read_is_shown_to_a_harness(response, finish, part):
    assert shown(response, finish) == part


def test_a_harness_gets_the_answer_and_the_store_the_whole_response(tmp_path):
    upstream = Upstream()
    with served(upstream, tmp_path) as (_, front):
        reply = ask(front, turn("Which?"))
        assert content(reply) == "B"
        assert reply.json()["usage"]["completion_tokens"] == 3
    (shard,) = (tmp_path / "calls").glob("*.jsonl")
    record = json.loads(shard.read_text())
    assert record["response"] == CHAIN
    assert record["messages"][-1]["content"] == "<image>\nWhich?"
    assert record["attention"]["vas"] == 2.0
    assert base64.b64encode(picture("red")).decode()[:40] not in shard.read_text()  # no image is kept


def test_requests_go_out_in_the_stated_protocol(tmp_path):
    upstream = Upstream()
    protocol = Protocol("Look.", "{question}\nThink.", 4096, 0.7, 0.9, seed=5, extra={"top_k": 20})
    with served(upstream, tmp_path, protocol, repeat=2) as (_, front):
        theirs = [{"role": "system", "content": "Answer directly."}, *turn("Which?")]
        ask(front, theirs, max_tokens=128, temperature=0, stop=["\n"], seed=1)
        ask(front, [{"role": "user", "content": "No image {question}"}], max_tokens=8192)
    first, second = upstream.asked
    assert first.pop("messages") == [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": [turn("")[0]["content"][0], {"type": "text", "text": "Which?\nThink."}]},
    ]
    assert first == {
        "model": "model", "max_tokens": 4096, "temperature": 0.7, "top_p": 0.9, "seed": 7, "top_k": 20,
    }  # fmt: skip
    assert second["messages"][-1]["content"] == "No image {question}\nThink."
    assert second["max_tokens"] == 8192


def test_without_our_system_turn_the_harness_keeps_its_own_and_greedy_requests_have_no_seed(tmp_path):
    upstream = Upstream()
    with served(upstream, tmp_path, Protocol(None, seed=5)) as (_, front):
        ask(front, [{"role": "system", "content": "Theirs."}, *turn("Which?")])
    (asked,) = upstream.asked
    assert asked["messages"][0] == {"role": "system", "content": "Theirs."}
    assert "seed" not in asked


def test_answered_requests_cost_nothing_again_unless_protocol_or_repeat_differ(tmp_path):
    upstream = Upstream()
    for _ in range(2):  # the second proxy has but the first one's files
        with served(upstream, tmp_path) as (proxy, front):
            assert content(ask(front, turn("Which?"))) == "B"
            assert list(proxy.answered)
    assert len(upstream.asked) == 1 and proxy.counts["stored"] == 1
    with served(upstream, tmp_path, Protocol(max_tokens=20000)) as (_, front):
        ask(front, turn("Which?"))
    with served(upstream, tmp_path, repeat=1) as (_, front):
        ask(front, turn("Which?"))
    assert len(upstream.asked) == 3


def test_the_same_request_at_the_same_time_is_made_once(tmp_path):
    upstream, replies = Upstream(), []
    with served(upstream, tmp_path) as (_, front):
        threads = [
            threading.Thread(target=lambda: replies.append(content(ask(front, turn("Which?"))))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert replies == ["B"] * 4 and len(upstream.asked) == 1


def test_errors_are_passed_on_and_not_kept(tmp_path):
    upstream = Upstream(status=400)
    with served(upstream, tmp_path) as (proxy, front):
        reply = ask(front, turn("Which?"))
        assert reply.status_code == 400 and reply.json()["error"]["message"] == "too many images"
        upstream.status = 418
        reply = ask(front, turn("Which?"))
        assert reply.status_code == 502 and "no chat completion" in reply.json()["error"]["message"]
        upstream.status = 200
        assert content(ask(front, turn("Which?"))) == "B"
        assert ask(front, turn("Which?"), stream=True).status_code == 400
        assert proxy.counts == {"asked": 3, "failed": 2}


def test_a_server_that_is_gone_is_said_to_be(tmp_path):
    proxy = Proxy(tmp_path, Endpoint("http://127.0.0.1:9/v1", "model"), Protocol())
    with serving(proxy) as front:
        reply = ask(front, turn("Which?"))
    assert reply.status_code == 502 and "127.0.0.1:9" in reply.json()["error"]["message"]


def test_a_scorer_gets_the_named_judge_or_none(tmp_path):
    upstream = Upstream("<answer>Yes</answer>")
    with served(upstream, tmp_path) as (proxy, front):
        reply = ask(front, [{"role": "user", "content": "Is 5 cm 5?"}], "/judge/v1")
        assert reply.status_code == 403 and "no judge" in reply.text
        assert not upstream.asked and proxy.counts["refused_judge"] == 1
    with served(upstream, tmp_path, judge=True) as (_, front):
        reply = ask(front, [{"role": "user", "content": "Is 5 cm 5?"}], "/judge/v1", temperature=1, max_tokens=9)
        assert content(reply) == "<answer>Yes</answer>"  # a judge's answer is not cut
    assert upstream.asked[0]["model"] == "a judge"
    assert upstream.asked[0]["temperature"] == 0 and upstream.asked[0]["max_tokens"] == 9


def records_of(tmp_path: Path, *asked: tuple[str, str]) -> list[dict]:
    """What a proxy keeps of (text, colour of the image), each answered by its text and colour."""

    def answer(body: dict) -> str:
        image, text = body["messages"][-1]["content"]
        with Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].partition(",")[2]))) as shown:
            pixel = shown.convert("RGB").getpixel((5, 5))
        return f"<think>{pixel}</think><answer>{'B' if 'Which' in text['text'] else 'A'}</answer>"

    with served(Upstream(answer), tmp_path) as (proxy, front):
        for text, colour in asked:
            ask(front, turn(text, colour))
        return [proxy.new[key] for key in proxy.answered]


def test_questions_with_the_same_words_and_answers_are_told_apart_by_their_images(tmp_path):
    records = records_of(tmp_path, ("Which?", "blue"), ("Where?", "red"), ("Which?", "red"), ("Which?", "lime"))
    asked = [question(0, colour="red"), question(1, colour="lime"), question(2, colour="blue")]
    found = match(asked, [Verdict("B", True)] * 3, records)
    assert [found.index(record) if record in found else None for record in records] == [2, None, 0, 1]
    (nothing,) = match([question(0)], [Verdict("C", False)], records)
    assert nothing is None


def test_a_question_that_is_only_in_its_image_is_found_by_the_image(tmp_path):
    records = records_of(tmp_path, ("Which?", "blue"), ("Which?", "lime"))
    asked = [question(0, "In the image", colour="lime"), question(1, "In the image", colour="red")]
    found = match(asked, [Verdict("B", True)] * 2, records)
    assert found == [records[1], None]


def test_results_have_our_verdict_and_the_harness_own(tmp_path):
    records = records_of(tmp_path, ("Which? A. red B. blue", "red"))
    asked = [question(0), question(1, text="Unasked?")]
    rows = result_rows(asked, [Verdict("B", False, "Unknown"), None], records, "kit 1")
    ours, theirs, failed = pa.Table.from_pylist(rows, schema=RESULTS).to_pylist()
    assert (ours["scored_by"], ours["right"], ours["extracted"], ours["problem"]) == ("rules", True, "B", None)
    assert (theirs["scored_by"], theirs["right"], theirs["extracted"]) == ("kit 1", False, "Unknown")
    assert ours["response"] == theirs["response"] == "<think>(254, 0, 0)</think><answer>B</answer>"
    assert (ours["vas"], ours["visual_ratio"], ours["completion_tokens"]) == (2.0, 0.5, 3)
    assert (failed["problem"], failed["right"], failed["response"]) == ("failed", None, None)
    cut = result_rows(asked[:1], [Verdict("B", True)], [records[0] | {"finish": "length"}], "kit 1")
    assert [row["problem"] for row in cut] == [None, None]  # it was answered before the limit
    (line,) = agreement(rows)
    assert (line["scored"], line["rules"], line["theirs"]) == (1, 1, 0)
    assert [one["id"] for one in line["disagree"]] == ["0"]


def settings(tmp_path: Path, *benchmarks: Benchmark, **more) -> HarnessSettings:
    return HarnessSettings(tmp_path, Endpoint("http://127.0.0.1:9/v1", "model"), benchmarks, **more)


def test_vlmevalkit_is_told_rules_only_unless_a_judge_is_named(tmp_path):
    benchmarks = (Benchmark("a"), Benchmark("b", kind="MathVista"))
    told = settings(tmp_path, *benchmarks, protocol=Protocol(max_tokens=9000))
    words = vlmevalkit.command(Path("/e/python"), Path("/kit"), told, "http://p", tmp_path / "raw")
    assert words[:2] == ["/e/python", "/kit/run.py"]
    pairs = dict(itertools.pairwise(words))
    assert pairs["--judge"] == "exact_matching" and pairs["--judge-base-url"] == "http://p/judge/v1"
    assert pairs["--base-url"] == "http://p/v1" and pairs["--max-tokens"] == "9000"
    assert words[words.index("--data") + 1 : words.index("--work-dir")] == ["a", "b"]
    assert json.loads(pairs["--data-config"]) == {"b": {"class": "MathVista", "dataset": "b"}}
    named = settings(tmp_path, *benchmarks, judge=Endpoint("http://j/v1", "judge-7b"))
    words = vlmevalkit.command(Path("/e/python"), Path("/kit"), named, "http://p", tmp_path / "raw")
    assert words[words.index("--judge") + 1] == "judge-7b"


def test_lmms_eval_is_given_a_task_over_the_file_and_its_limits(tmp_path):
    import yaml

    told = settings(tmp_path, Benchmark("toy"), protocol=Protocol(max_tokens=9000, temperature=0.5, seed=3))
    words = lmms_eval.command(Path("/e/python"), told, "http://p", tmp_path)
    pairs = dict(itertools.pairwise(words))
    assert words[:3] == ["/e/python", "-m", "lmms_eval"]
    assert "base_url=http://p/v1" in pairs["--model_args"].split(",")
    assert pairs["--gen_kwargs"] == "max_new_tokens=9000,temperature=0.5,top_p=1.0" and pairs["--seed"] == "3"
    lmms_eval.write_task(tmp_path / "toy", "toy", tmp_path / "toy.parquet", 9000)
    text = (tmp_path / "toy" / "toy.yaml").read_text()
    task = yaml.safe_load(text.replace("!function ", ""))
    assert task["dataset_kwargs"]["data_files"] == {"test": str(tmp_path / "toy.parquet")}
    assert task["generation_kwargs"]["max_new_tokens"] == 9000
    functions = (tmp_path / "toy" / "questions_task.py").read_text()
    assert all(f"def {task[name].removeprefix('questions_task.')}(" in functions for name in task if "_to_m" in name)


def test_keys_of_this_process_do_not_reach_a_harness(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("GOOGLE_API_KEY", "secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    variables = environment(settings(tmp_path), "http://p")
    assert "secret" not in variables.values() and "PYTHONPATH" not in variables
    assert variables["OPENAI_API_BASE"] == "http://p/judge/v1"
    assert variables["HF_DATASETS_OFFLINE"] == "1"


def test_a_harness_that_fails_is_told_in_one_line(tmp_path):
    log = tmp_path / "harness" / "log.txt"
    code = "import os; print('fine'); print(os.getpid()); raise ValueError('no such task: x')"
    with pytest.raises(HarnessFailed, match=r"status 1: ValueError: no such task: x .*log\.txt"):
        launch([sys.executable, "-c", code], dict(os.environ), log, tmp_path)
    lines = log.read_text().splitlines()
    assert "fine" in lines
    launch([sys.executable, "-c", "print('second')"], dict(os.environ), log, tmp_path)
    assert "second" in log.read_text() and "fine" in log.read_text()


def test_what_a_harness_started_ends_with_it(tmp_path):
    code = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid)"
    launch([sys.executable, "-c", code], dict(os.environ), tmp_path / "log.txt", tmp_path)
    child = int((tmp_path / "log.txt").read_text().splitlines()[-1])
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_harness_does_not_outlive_a_killed_run(tmp_path):
    log = tmp_path / "log.txt"
    code = (
        "import os; from pathlib import Path; from verl_avar.evaluation.benchmark.harness.launch import launch\n"
        f"launch(['sh', '-c', 'echo $$; exec sleep 60'], dict(os.environ), Path({str(log)!r}), Path({str(tmp_path)!r}))"
    )
    run = subprocess.Popen([sys.executable, "-c", code])
    end = time.monotonic() + 20
    said = ""
    while time.monotonic() < end and not said.isdigit():  # a line of its own, behind the command, which ends in 60
        time.sleep(0.05)
        said = log.read_text().rstrip("\n").rpartition("\n")[2] if log.exists() else ""
    harness = int(said)
    assert members(harness)
    run.kill()
    run.wait()
    while members(harness) and time.monotonic() < end:
        time.sleep(0.05)
    assert not members(harness)


def test_predictions_and_verdicts_of_vlmevalkit_are_read(tmp_path):
    folder = tmp_path / "predictions" / "avar" / "T20261121-221643"
    shutil.copytree(SAMPLES, folder)
    choices = vlmevalkit.read_predictions("cases_choice", tmp_path)
    assert choices["1"] == Verdict("b", False) and choices["2"] == Verdict("(B) blue", True)
    yes_no = vlmevalkit.read_predictions("cases_yesno", tmp_path)
    assert yes_no["4"] == Verdict("It is red, so yes", True, "Yes") and yes_no["3"].right is False
    assert vlmevalkit.read_predictions("cases", tmp_path) == {}
    (folder / "avar_cases_yesno_auxmatch.tsv").unlink()
    assert vlmevalkit.read_predictions("cases_yesno", tmp_path)["0"] == Verdict("Yes", None)


def test_predictions_and_verdicts_of_lmms_eval_are_read(tmp_path):
    found = lmms_eval.read_samples(SAMPLES, "cases_choice", ["q0", "q1", "q2", "q3", "q4"])
    assert found["q1"] == Verdict("b", False) and found["q3"] == Verdict("B. blue", True)
    line = json.loads((SAMPLES / "20261122_061109_samples_cases_choice.jsonl").read_text().splitlines()[0])
    line["filtered_resps"] = "[LMMS_EVAL_REQUEST_FAILED after 3 retries] Error code: 400"
    (tmp_path / "x_samples_toy.jsonl").write_text(json.dumps(line) + "\n")
    assert lmms_eval.read_samples(tmp_path, "toy", ["q0"]) == {}


def test_a_tsv_in_vlmevalkits_format_is_read(tmp_path):
    red, blue = (base64.b64encode(picture(colour)).decode() for colour in ("red", "blue"))
    lines = [
        ["index", "image", "question", "A", "B", "answer", "category"],
        ["7", red, "Which?", "None", "blue", "B", "c"],
        ["8", "7", "Is it?", "", "", "Yes", ""],
        ["9", f"['{red}', '{blue}']", "How many?", "", "", "2", ""],
    ]
    file = tmp_path / "t.tsv"
    file.write_text("".join("\t".join(line) + "\n" for line in lines))
    first, second, third = vlmevalkit.read_tsv(Benchmark("t", file))
    assert (first["choices"], first["answer_type"], first["meta"]) == (["None", "blue"], "choice", '{"category": "c"}')
    assert (second["answer_type"], second["images"]) == ("yes_no", [{"bytes": picture("red")}])
    assert [image["bytes"] for image in third["images"]] == [picture("red"), picture("blue")]
    assert third["answer_type"] == "text"


def test_what_is_missing_is_said_with_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("AVAR_EVAL_PYTHON", str(tmp_path))
    with pytest.raises(ConfigError, match="no Python interpreter"):
        harness_python()
    with pytest.raises(ConfigError, match=r"--harness-path"):
        vlmevalkit.checkout(tmp_path)
    with pytest.raises(ConfigError, match="there is no None"):
        lmms_eval.read_questions(None, "toy")
    with pytest.raises(ConfigError, match="digits"):
        vlmevalkit.read_tsv(Benchmark("a/b", tmp_path))
    (tmp_path / "t.tsv").write_text("index\tquestion\n1\tWhich?\n")
    with pytest.raises(ConfigError, match="lacks the columns answer"):
        vlmevalkit.read_tsv(Benchmark("t", tmp_path / "t.tsv"))
    with pytest.raises(ConfigError, match="no lmms-eval"):
        lmms_eval.version(Path("/bin/false"))
    with pytest.raises(ConfigError, match="question"):
        Protocol(template="Think.")


def test_runs_lmms_eval_and_again_for_nothing(tmp_path):
    try:
        python = harness_python()
        lmms_eval.version(python)
    except ConfigError as missing:
        pytest.skip(str(missing))
    file, upstream = tmp_path / "toy.parquet", Upstream()
    rows = [question(0), question(1, answer="A", colour="blue")]
    pq.write_table(pa.Table.from_pylist(rows, schema=QUESTIONS), file)
    with serving(Plain(upstream.app)) as address:
        told = HarnessSettings(
            tmp_path / "out", Endpoint(f"{address}/v1", "model"), (Benchmark("toy", file),), python=python
        )
        first = lmms_eval.run(told)
        before = first.read_bytes()
        again = lmms_eval.run(told)
    results = pq.read_table(first).to_pylist()
    verdicts = [(row["id"], row["scored_by"], row["right"]) for row in results]
    harness = f"lmms-eval {lmms_eval.version(python)}"
    assert verdicts == [("0", "rules", True), ("0", harness, True), ("1", "rules", False), ("1", harness, False)]
    assert all(row["response"] == CHAIN for row in results)
    assert len(upstream.asked) == 2 and again.read_bytes() == before
