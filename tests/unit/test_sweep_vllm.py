"""`avar intervene --backend vllm` without vLLM: prompts, requests, records, and all that a server can do wrong."""

import asyncio
import copy
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time

import families
import numpy as np
import pandas as pd
import pytest
from families.loaded import noise
from PIL import Image
from pretend_vllm import RIGHT, WRONG, PretendVllm, pictures
from test_intervene import Fake, options

from verl_avar.evaluation import intervene, sweep_server, sweep_vllm
from verl_avar.evaluation.checkpoint import load_checkpoint, prompt_inputs
from verl_avar.evaluation.images import open_images
from verl_avar.evaluation.rows import Row, read_rows
from verl_avar.evaluation.sweep import Task, strengths
from verl_avar.evaluation.sweep_prompts import Prompts, check_model, load_prompter
from verl_avar.evaluation.sweep_vllm import Reply, Unanswered, VllmBackend, as_record
from verl_avar.miniature import base_path
from verl_avar.miniature.data import write_eval

MODEL = str(base_path())


@pytest.fixture(scope="module")
def prompter():
    return load_prompter(MODEL)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_eval(tmp_path_factory.mktemp("rows") / "eval.parquet", 2, seed=0)  # 8 rows


@pytest.fixture
def serve(prompter, monkeypatch):
    """serve(fault) starts a server; all end with the test."""
    monkeypatch.setattr(sweep_server, "PAUSE_S", 0.05)
    started = []

    def start(*fault, root=MODEL):
        started.append(PretendVllm(prompter, root, *fault))
        return started[-1]

    yield start
    for server in started:
        if not server.ended.is_set():
            server.close()


def words(data, out, *more) -> tuple:
    return ("--model", MODEL, "--data", data, "--out", out, "--max-new-tokens", 40, "--beta", "0,0.5", *more)


def run(server, data, out, *more) -> int:
    return intervene.run(options(*words(data, out, "--server", getattr(server, "url", server), *more)))


def records(out) -> list[dict]:
    return [json.loads(line) for line in (out / "records.jsonl").read_text(encoding="utf-8").splitlines()]


def test_prompt_ids_are_those_of_the_transformers_path(data, prompter):
    """Also of several pictures, with and without a system turn, in a padded batch."""
    rows = read_rows(data)
    rows[1].messages[-1]["content"] += [{"type": "image"}, {"type": "text", "text": "And here?"}]
    rows[1].images.append(noise(150, 70))
    rows[2].messages = rows[2].messages[1:]
    prompts = [Prompts(prompter, 7).make(row.messages, row.images) for row in rows]
    inputs = prompt_inputs(load_checkpoint(MODEL), [row.messages for row in rows], [row.images for row in rows])
    for prompt, ids, mask in zip(prompts, inputs["input_ids"], inputs["attention_mask"], strict=True):
        assert prompt.ids == ids[mask.bool()].tolist() and prompt.limit == 7
    assert len({len(prompt.ids) for prompt in prompts}) > 1


def test_an_answer_ends_where_transformers_would_end_it(prompter):
    assert Prompts(prompter, 9).make([{"role": "user", "content": "x"}], []).ends == [434]
    prompt = Prompts(prompter, 10_000).make([{"role": "user", "content": "x"}], [])
    assert prompt.limit == 512 - len(prompt.ids)  # the miniature's context
    config = copy.deepcopy(prompter.model.config)
    config.text_config.max_position_embeddings = len(prompt.ids)
    full = dataclasses.replace(prompter, model=dataclasses.replace(prompter.model, config=config))
    with pytest.raises(ValueError, match=f"fills the model's context of {len(prompt.ids)}"):
        Prompts(full, 1).make([{"role": "user", "content": "x"}], [])


def test_requests_are_greedy_whatever_the_server_prefers(serve, data, tmp_path):
    server = serve()
    assert run(server, data, tmp_path, "--system-beta", "0,-1", "--max-new-tokens", 30) == 0
    assert len(server.bodies) == 8 * 4
    for body in server.bodies:
        settings = {name: body[name] for name in ("model", "temperature", "top_p", "top_k", "min_p", "n", "min_tokens")}
        assert settings == {
            **{"model": "tuned", "temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0, "n": 1, "min_tokens": 0}
        }
        assert (body["repetition_penalty"], body["frequency_penalty"], body["presence_penalty"]) == (1, 0, 0)
        assert (body["ignore_eos"], body["stop_token_ids"], body["max_completion_tokens"]) == (True, [434], 30)
        assert body["vllm_xargs"].keys() == {"visual_bias", "system_bias", "attention_scores"}
    asked = [(body["vllm_xargs"]["visual_bias"], body["vllm_xargs"]["system_bias"]) for body in server.bodies]
    assert {bias: asked.count(bias) for bias in asked} == {(0, 0): 8, (0, -1): 8, (0.5, 0): 8, (0.5, -1): 8}


def test_pictures_arrive_as_transformers_sees_them(serve, tmp_path):
    """Turned by EXIF, on white where transparent, pixel by pixel, in the order of the conversation."""
    turned, clear = noise(60, 40), noise(50, 50).convert("RGBA")
    clear.putalpha(Image.fromarray(np.arange(2500, dtype=np.uint8).reshape(50, 50)))
    exif = Image.Exif()
    exif[0x0112] = 6
    file, other = io.BytesIO(), io.BytesIO()
    turned.save(file, format="jpeg", exif=exif)
    clear.save(other, format="png")
    images = [{"bytes": file.getvalue()}, {"bytes": other.getvalue()}]
    path = tmp_path / "rows.parquet"
    pd.DataFrame([{"question": "<image>or<image>?", "images": images, "answer": "red"}]).to_parquet(path)
    server = serve()
    assert run(server, path, tmp_path / "out") == 0
    sent, wanted = pictures(server.bodies[0]), open_images(images)
    assert sent[0].size == (40, 60)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(sent, wanted, strict=True))
    kinds = [part["type"] for part in server.bodies[0]["messages"][0]["content"]]
    assert kinds == ["image_url", "text", "image_url", "text"]


def test_records_are_those_of_the_transformers_path(serve, data, tmp_path):
    assert run(serve(), data, tmp_path) == 0
    found = records(tmp_path)
    ((_, wanted),) = Fake()([Task(strengths(beta=[1])[0], 0, Row("a"))])
    assert all(record.keys() == wanted.keys() | {"key", "number", "id"} for record in found)
    by_point = {record["key"]: record for record in found}
    assert by_point["0,0"]["response"] == WRONG and by_point["0.5,0"]["response"] == RIGHT
    assert {name: by_point["0.5,0"][name] for name in ("vas", "head_mean", "visual", "system", "cut")} == {
        **{"vas": 2.5, "head_mean": 1.5, "visual": 0.2, "system": 0.1, "cut": False}
    }
    results = json.loads((tmp_path / "intervene.json").read_text(encoding="utf-8"))
    assert results["settings"]["backend"] == "vllm server"
    assert results["points"][1]["format"]["value"] == 1.0 and results["points"][0]["format"]["value"] == 0.0


def test_many_requests_are_in_flight_but_no_more_than_asked_for(serve, data, tmp_path):
    server = serve(lambda server, body: time.sleep(0.05))
    assert run(server, data, tmp_path, "--concurrency", 3) == 0
    assert server.most == 3


def fails_once(status, message):
    """A fault of the first request under a bias."""

    def fault(server, body):
        if body["vllm_xargs"]["visual_bias"] > 0 and not getattr(server, "failed", False):
            server.failed = True
            return status, {"error": {"message": message, "code": status}}
        return None

    return fault


@pytest.mark.parametrize("status", [400, 429, 500])
def test_a_request_that_fails_is_reported_with_its_row_and_only_it_is_asked_again(
    serve, data, tmp_path, capsys, status
):
    server = serve(fails_once(status, "prompt too long"))
    assert run(server, data, tmp_path, "--concurrency", 1) == 1
    assert f"row 0 at β 0.5: the server at {server.url} answers {status}: prompt too long" in " ".join(
        capsys.readouterr().out.split()
    )
    assert sum("problem" in record for record in records(tmp_path)) == 1 and len(records(tmp_path)) == 16
    again = serve()
    assert run(again, data, tmp_path) == 0
    assert [body["vllm_xargs"]["visual_bias"] for body in again.bodies] == [0.5]


def test_a_broken_picture_is_not_sent(serve, data, tmp_path):
    frame = pd.read_parquet(data)[:3]
    images = list(frame["images"])
    images[1] = [{"bytes": b"no image"}]
    frame.assign(images=images).to_parquet(tmp_path / "rows.parquet")
    server = serve()
    assert run(server, tmp_path / "rows.parquet", tmp_path / "out") == 1
    assert len(server.bodies) == 4
    broken = [record for record in records(tmp_path / "out") if "problem" in record]
    assert {record["id"] for record in broken} == {"1"} and "cannot identify image" in broken[0]["problem"]


def test_a_server_that_goes_away_leaves_what_it_answered(serve, data, tmp_path, capsys):
    def fault(server, body):
        if len(server.bodies) == 6:
            server.close()
            return server.drop
        return None

    server = serve(fault)
    assert run(server, data, tmp_path, "--concurrency", 1) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"avar intervene: the server at {server.url} is gone: ") and err.count("\n") == 1
    assert len(records(tmp_path)) == 5
    again = serve()
    assert run(again, data, tmp_path) == 0
    assert len(again.bodies) == 11


def test_a_connection_that_breaks_is_tried_again(serve, data, tmp_path):
    server = serve(lambda server, body: server.drop if len(server.bodies) == 4 else None)
    assert run(server, data, tmp_path, "--concurrency", 1) == 0
    assert len(server.bodies) == 17


def test_an_answer_that_takes_too_long_is_that_rows_problem(serve, data, tmp_path):
    def fault(server, body):
        if len(server.bodies) == 3:
            server.ended.wait(20)

    assert run(serve(fault), data, tmp_path, "--timeout", 1, "--concurrency", 4) == 1
    (broken,) = [record for record in records(tmp_path) if "problem" in record]
    assert broken["problem"].endswith("gave no answer within 1 s")


def test_a_server_that_answers_nothing_more_is_given_up(serve, data, tmp_path, capsys):
    def fault(server, body):
        if len(server.bodies) > 4:
            server.ended.wait(20)

    assert run(serve(fault), data, tmp_path, "--timeout", 1, "--concurrency", 8) == 2
    assert "8 requests to the server at" in capsys.readouterr().err
    assert sum("problem" not in record for record in records(tmp_path)) == 4


def test_where_no_server_answers_nothing_is_begun(serve, data, tmp_path, capsys):
    server = serve()
    server.close()
    assert run(server, data, tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"avar intervene: no server answers at {server.url} (") and "avar serve MODEL" in err
    assert not (tmp_path / "out").exists()


def without(*names):
    return lambda answer: {name: value for name, value in answer.items() if name not in names}


def other_ids(answer):
    return answer | {"prompt_token_ids": [*answer["prompt_token_ids"][:-1], 5, 6]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("kv_transfer_params"), "without the visual-attention connector: start it with `avar serve MODEL`"),
        (lambda answer: answer | {"kv_transfer_params": {}}, "start it with `avar serve MODEL`"),
        (without("prompt_token_ids"), "returns no token ids: it is no vLLM server"),
        (other_ids, "makes another prompt of it than this checkpoint's template and processor"),
    ],
)
def test_a_server_that_is_not_ours_is_an_error_before_anything_begins(serve, data, tmp_path, capsys, change, says):
    server = serve()
    server.change = change
    assert run(server, data, tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_400_of_an_engine_without_the_connector_is_understood(serve, data, tmp_path, capsys):
    server = serve()
    said = "visual_bias: this engine runs without the visual-attention connector; start it with …"
    server.RequestHandlerClass = type(
        "Refusing",
        (server.RequestHandlerClass,),
        {"do_POST": lambda self: self.send(400, {"error": {"message": said, "code": 400}})},
    )
    assert run(server, data, tmp_path) == 2
    assert "start it with `avar serve MODEL`" in capsys.readouterr().err


@pytest.mark.parametrize("status", [401, 404])
def test_a_server_that_would_refuse_everything_is_an_error(serve, data, tmp_path, capsys, status):
    server = serve(lambda server, body: (status, {"error": {"message": "no", "code": status}}))
    assert run(server, data, tmp_path, "--concurrency", 1) == 2
    assert f"answers {status}: no" in capsys.readouterr().err
    assert len(server.bodies) == 1


def test_another_prompt_in_the_middle_of_a_sweep_ends_it(serve, data, tmp_path, capsys):
    server = serve()
    server.change = lambda answer: other_ids(answer) if len(server.bodies) > 4 else answer
    assert run(server, data, tmp_path, "--concurrency", 1) == 2
    assert "row 2: the server at" in capsys.readouterr().err
    assert len(records(tmp_path)) == 4


def test_a_server_of_another_model_is_an_error_until_it_is_named(serve, data, tmp_path, capsys):
    server = serve(root="/elsewhere/other")
    assert run(server, data, tmp_path) == 2
    assert "serves tuned (from /elsewhere/other), not " in capsys.readouterr().err
    assert run(server, data, tmp_path, "--served-model", "tuned") == 0


def test_a_folder_of_the_same_name_with_other_files_is_another_model(serve, data, tmp_path, capsys):
    other = tmp_path / base_path().name
    other.mkdir()
    (other / "config.json").write_text("{}", encoding="utf-8")
    assert run(serve(root=str(other)), data, tmp_path / "out") == 2
    assert "whose files are not those of" in capsys.readouterr().err


def test_the_right_model_of_several_is_asked(serve, data, tmp_path):
    server = serve()
    server.cards.insert(0, {"id": "adapter", "object": "model", "root": "/lora/adapter", "parent": "tuned"})
    assert run(server, data, tmp_path) == 0
    assert {body["model"] for body in server.bodies} == {"tuned"}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--mode", "scale_weights"], "--mode scale_weights: vLLM adds a bias to the logits"),
        (["--queries", "response"], "--queries response: vLLM adds a bias"),
        (["--layers", "0-2,4"], "--layers 0,1,2,4: vLLM adds a bias"),
        (["--device", "cpu"], "--device: an option of"),
        (["--batch-size", 2], "--batch-size: an option of"),
    ],
)
@pytest.mark.parametrize("backend", [["--backend", "vllm"], ["--server", "http://127.0.0.1:9"]])
def test_what_vllm_cannot_do_is_one_line_before_anything_is_started(data, tmp_path, capsys, backend, more, says):
    assert intervene.run(options(*words(data, tmp_path / "out", *backend, *more))) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
    assert "--backend transformers" in err or "an option of --backend vllm without --server" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--concurrency", 4], "--concurrency: an option of --backend vllm"),
        (["--backend", "transformers", "--server", "http://x"], "--server: an option of --backend vllm"),
        (["--backend", "vllm", "--served-model", "a"], "--served-model: an option of --server"),
        (["--server", "http://x", "--dtype", "bfloat16"], "--dtype: an option of --backend vllm without --server"),
        (["--server", "localhost:8000"], "write http://HOST:PORT"),
        (["--backend", "vllm", "--engine-option", "kv_transfer_config=1"], "kv_transfer_config is set by avar"),
    ],
)
def test_options_of_another_backend_are_an_error(data, tmp_path, capsys, more, says):
    assert intervene.run(options(*words(data, tmp_path / "out", *more))) == 2
    assert says in capsys.readouterr().err


def test_results_of_another_backend_are_not_mixed_in(serve, data, tmp_path, capsys):
    assert run(serve(), data, tmp_path) == 0
    assert intervene.run(options(*words(data, tmp_path))) == 2
    assert "backend: vllm server there, transformers asked for" in capsys.readouterr().err


REFUSED = {
    "qwen3_5": "layers of linear_attention",
    "qwen3_5_moe": "layers of linear_attention",
    "gemma3": "layers of sliding_attention",
    "mllama": "layers of cross-attention",
    "llava": "only ChatML templates",
    "idefics3": "only ChatML templates",
    "smolvlm": "a turn of unknown role",
}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_families_that_the_connector_does_not_serve_are_refused_by_name(family, tmp_path):
    checkpoint = load_prompter(families.build(family, tmp_path))
    if family not in REFUSED:
        return check_model(checkpoint)
    with pytest.raises(ValueError, match=f"Config: .*{REFUSED[family]}.*; use --backend transformers"):
        check_model(checkpoint)


@pytest.fixture
def prompt(prompter):
    return dataclasses.replace(Prompts(prompter, 4).make([{"role": "user", "content": "x"}], []), limit=4)


SCORE = {"ratio": 1.0, "vas": 2.0, "visual_mass": 0.2, "system_mass": 0.1, "n": 3}


def record(prompter, prompt, ids, **changes):
    return as_record(prompter, prompt, Reply(prompt.ids, ids, "stop", SCORE | {"n": len(ids)} | changes), "the engine")


def test_the_end_marker_is_counted_and_not_decoded(prompter, prompt):
    red = prompter.tokenizer.encode("red", add_special_tokens=False)
    ended = record(prompter, prompt, [*red, 434])
    assert (ended["response"], ended["tokens"], ended["cut"]) == ("red", len(red) + 1, False)
    cut = record(prompter, prompt, (red * 4)[:4])
    assert (cut["tokens"], cut["queries"], cut["cut"]) == (4, 4, True)


def test_without_a_system_turn_there_are_masses_but_no_vas(prompter, prompt):
    found = record(prompter, prompt, [5, 434], ratio=None, vas=None, reason="the prompt has no system turn")
    assert (found["vas"], found["head_mean"], found["visual"]) == (None, None, 0.2)


@pytest.mark.parametrize(
    ("ids", "changes", "says"),
    [
        ([5, 440, 434], {}, r"the response holds <\|image_pad\|>, the model's placeholder"),
        ([5, 6], {}, "ended the answer after 2 of 4 tokens"),
        ([], {}, "ended the answer after 0 of 4 tokens"),
        ([5, 434], {"visual_mass": None, "reason": "a broken turn"}, "gave no scores for this answer: a broken turn"),
        ([5, 434], {"n": 1, "reason": "aborted"}, "gave no scores"),
    ],
)
def test_what_transformers_would_not_have_answered_is_a_problem(prompter, prompt, ids, changes, says):
    with pytest.raises(ValueError, match=says):
        record(prompter, prompt, ids, **changes)


class Scripted:
    """An engine that does what it is told for each row number."""

    where, remedy = "the engine", ""

    def __init__(self, does):
        self.does, self.cancelled, self.closed = does, 0, False

    def request(self, prompt, strength):
        return prompt

    async def answer(self, prompt):
        try:
            return await self.does(prompt)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def close(self):
        self.closed = True


def text_tasks(n):
    content = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
    return [Task(strengths(beta=[1])[0], number, Row(str(number), content)) for number in range(n)]


def good(prompt):
    return Reply(prompt.ids, [5, 434], "stop", SCORE | {"n": 2})


def test_what_was_answered_is_there_before_the_error_that_ends_a_sweep(prompter):
    seen = []

    async def does(prompt):
        seen.append(prompt)
        mine = len(seen)
        await asyncio.sleep({1: 0, 2: 0.5}.get(mine, 20))
        if mine == 2:
            raise RuntimeError("the engine died")
        return good(prompt)

    backend = VllmBackend(Prompts(prompter, 4), engine := Scripted(does), 5)
    found = []
    with pytest.raises(RuntimeError, match="the engine died"):
        for task, _ in backend(text_tasks(9)):
            found.append(task.number)
    assert found == [0] and len(seen) == 6 and engine.cancelled == 4
    backend.close()
    assert engine.closed


def test_a_sweep_that_is_left_drops_what_is_in_flight(prompter):
    async def does(prompt):
        if not first:
            first.append(prompt)
            return good(prompt)
        await asyncio.sleep(60)

    first = []
    backend = VllmBackend(Prompts(prompter, 4), engine := Scripted(does), 4)
    sweep = backend(text_tasks(9))
    next(sweep)
    backend.close()
    assert engine.closed and engine.cancelled == 3
    backend.close()  # once is enough, twice is no error


def test_failures_in_a_row_end_a_sweep_and_scattered_ones_do_not(prompter, monkeypatch):
    monkeypatch.setattr(sweep_vllm, "FEWEST_FAILURES", 3)
    count = 0

    async def every_other(prompt):
        nonlocal count
        count += 1
        if count % 2:
            raise Unanswered("too slow")
        return good(prompt)

    async def never(prompt):
        raise Unanswered("too slow")

    async def refused(prompt):
        raise ValueError("too long")

    for does, answered in ((every_other, 12), (refused, 12), (never, 2)):
        backend, found = VllmBackend(Prompts(prompter, 4), Scripted(does), 1), []
        try:
            found.extend(record for _, record in backend(text_tasks(12)))
            assert len(found) == answered
        except RuntimeError as error:
            assert does is never and "3 requests to the engine failed one after the other, the last (row 2)" in str(
                error
            )
        backend.close()
    assert does is never


def test_pictures_of_a_row_are_prepared_once_for_all_points(serve, data, tmp_path, monkeypatch):
    made = []
    make = Prompts.make
    monkeypatch.setattr(Prompts, "make", lambda self, *row: made.append(row) or make(self, *row))
    server = serve()
    assert run(server, data, tmp_path, "--beta", "0,0.1,0.2,0.3", "--concurrency", 5) == 0
    assert len(server.bodies) == 32 and len(made) == 8 + 1  # and the probe


def test_a_run_that_is_killed_goes_on_where_it_was(serve, data, tmp_path):
    server = serve(lambda server, body: time.sleep(0.3))
    call = [*words(data, tmp_path / "out", "--server", server.url, "--concurrency", 2)]
    command = [sys.executable, "-m", "verl_avar.cli", "intervene", *map(str, call)]
    process = subprocess.Popen(command, env=os.environ, stderr=subprocess.DEVNULL)
    path = tmp_path / "out" / "records.jsonl"
    deadline = time.monotonic() + 120
    while not (path.exists() and path.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(records(tmp_path / "out"))
    assert 0 < done < 16
    again = serve()
    assert run(again, data, tmp_path / "out") == 0
    assert len(again.bodies) == 16 - done
    assert len({(record["key"], record["number"]) for record in records(tmp_path / "out")}) == 16
