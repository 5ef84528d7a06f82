"""`avar intervene` on a real vLLM engine and on a real server, against the transformers path, answer by answer."""

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from PIL import Image
from servers import MODEL as SERVED
from servers import SHARED, Server

from verl_avar.cli import main
from verl_avar.evaluation.rows import read_rows
from verl_avar.miniature import base_path
from verl_avar.miniature.data import write_eval
from verl_avar.rollout import kv_transfer_config

MODEL, NEW_TOKENS = str(base_path()), 24
POINTS = ["--beta=0,0.4,2", "--system-beta=0,-1"]
TEXTS = ("response", "tokens", "cut", "queries", "problem")
FIGURES = ("vas", "head_mean", "visual", "system")
ENGINE = ["--engine-option", "kv_cache_memory_bytes=67108864"]


def noise(seed, width, height, mode="RGB"):
    shape = (height, width, len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8), mode)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Questions of the miniature, then rows of other forms: several images, other sizes, a transparent one, no system
    turn, an earlier turn of the assistant, a prompt that leaves little room, one that is too long, a broken image."""
    folder = tmp_path_factory.mktemp("rows")
    rows = pd.read_parquet(write_eval(folder / "eval.parquet", 3, seed=1))

    def stored(image, **how):
        file = io.BytesIO()
        image.save(file, **({"format": "png"} | how))
        return {"bytes": file.getvalue()}

    system = {"role": "system", "content": "Look at the image."}
    first, wide = rows["images"][0][0], stored(noise(1, 160, 60))
    clear = stored(noise(2, 60, 90, "RGBA"))
    others = [
        ([system, {"role": "user", "content": "<image>and<image>\nWhat differs?"}], [first, wide]),
        ([{"role": "user", "content": "What is this? <image>"}], [clear]),
        (
            [
                {"role": "user", "content": "<image>What colour?"},
                {"role": "assistant", "content": "<answer>red</answer>"},
                {"role": "user", "content": "And here?<image> Say it  again.\n"},
            ],
            [wide, first],
        ),
        ([system, {"role": "user", "content": "<image>" + "What is where? " * 68}], [first]),
        ([system, {"role": "user", "content": "<image>" + "What is where? " * 200}], [first]),
        ([system, {"role": "user", "content": "<image>What?"}], [{"bytes": b"no image"}]),
    ]
    lines = [{"prompt": list(row.prompt), "images": list(row.images), "answer": "red"} for row in rows.itertuples()]
    lines += [{"prompt": prompt, "images": images, "answer": "red"} for prompt, images in others]
    pd.DataFrame(lines).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def words(data, out, *more):
    call = ["intervene", "--model", MODEL, "--data", str(data), "--out", str(out)]
    return [*call, *POINTS, "--max-new-tokens", str(NEW_TOKENS), *more]


def read(out):
    """Records by (point, row)."""
    lines = (out / "records.jsonl").read_text(encoding="utf-8").splitlines()
    return {(record["key"], record["number"]): record for record in map(json.loads, lines)}


@pytest.fixture(scope="module")
def expected(data, tmp_path_factory):
    """The transformers path, one row at a time."""
    out = tmp_path_factory.mktemp("transformers")
    assert main(words(data, out)) == 1  # two rows are broken
    return read(out)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """`avar serve`, with defaults that no request of a sweep may take."""
    flags = ["--kv-cache-memory-bytes", "64M", "--limit-mm-per-prompt", '{"image": 2, "video": 0}']
    flags += ["--override-generation-config", '{"temperature": 1.5, "repetition_penalty": 2.0}']
    config = kv_transfer_config(visual_bias=-3.0)
    with Server(Path(MODEL), tmp_path_factory.mktemp("server"), *flags, config=config) as started:
        yield started.wait()
        assert started.stop() == 0


def same(found, expected):
    """Equal texts and lengths, and figures to 1e-4; returns the largest difference of a figure."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for at, record in found.items():
        wanted = expected[at]
        assert {name: record.get(name) for name in TEXTS} == {name: wanted.get(name) for name in TEXTS}, at
        for name in FIGURES:
            if wanted.get(name) is None:
                assert record.get(name) is None
            else:
                assert record[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-4), (at, name)
                worst = max(worst, abs(record[name] - wanted[name]) / max(1.0, abs(wanted[name])))
    return worst


def test_the_rows_hold_what_they_should(data, expected):
    """Answers of all kinds: ended, cut by the limit, cut by the model's context, of several images."""
    rows = read_rows(data)
    assert len(rows) == 18 and [len(row.images) for row in rows[12:]] == [2, 1, 2, 1, 1, 1]
    good = [record for record in expected.values() if "problem" not in record]
    assert len(good) == 6 * 16
    assert {True, False} == {record["cut"] for record in good}
    assert any(record["cut"] and record["tokens"] < NEW_TOKENS for record in good)
    assert len({record["response"] for record in good}) > 20
    assert "more than the model's context of 512" in expected["0,0", 16]["problem"]
    assert "cannot identify image" in expected["0,0", 17]["problem"]


def test_an_engine_in_this_process_gives_the_same_records(data, expected, tmp_path, capfd):
    before = {path.name for path in SHARED.iterdir()}
    children = {child.pid for child in psutil.Process().children(recursive=True)}
    assert main(words(data, tmp_path / "out", "--backend", "vllm", *ENGINE)) == 1
    said = capfd.readouterr()
    assert "INFO" not in said.out + said.err and "WARNING" not in said.out + said.err
    print("largest difference", same(read(tmp_path / "out"), expected))
    results = json.loads((tmp_path / "out" / "intervene.json").read_text(encoding="utf-8"))
    assert results["settings"]["backend"] == "vllm" and results["settings"]["dtype"] == "float32"
    assert {failed["row"] for failed in results["broken"]} == {"16", "17"}
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in children]
    assert [child.cmdline() for child in left if "resource_tracker" not in " ".join(child.cmdline())] == []
    assert not [path for path in SHARED.iterdir() if path.name not in before and path.name.startswith(("psm", "avar"))]


def test_a_server_gives_the_same_records(data, expected, server, tmp_path):
    assert main(words(data, tmp_path / "out", "--server", server.url, "--concurrency", "16")) == 1
    print("largest difference", same(read(tmp_path / "out"), expected))


def test_a_smaller_context_of_the_engine_is_a_problem_and_never_a_shorter_answer(data, expected, tmp_path):
    call = words(data, tmp_path / "out", "--backend", "vllm", *ENGINE, "--engine-option", "max_model_len=64")
    assert main(call) == 1
    refused = cut = 0
    for at, record in read(tmp_path / "out").items():
        problem = record.get("problem", "")
        refused += "the engine refused it: " in problem
        cut += "the engine ended the answer after" in problem
        if not problem:
            same({at: record}, {at: expected[at]})
    assert refused >= 6 and cut >= 3


def test_a_server_that_is_killed_and_one_that_takes_over(data, expected, tmp_path, tmp_path_factory, server, capsys):
    """The sweep ends with an error and keeps its answers; another server goes on with the missing ones."""
    flags = ["--kv-cache-memory-bytes", "64M", "--limit-mm-per-prompt", '{"image": 2, "video": 0}']
    folder = tmp_path_factory.mktemp("killed")
    out = tmp_path / "out"
    with Server(Path(MODEL), folder, *flags, config=kv_transfer_config()) as killed:
        killed.wait()
        call = [sys.executable, "-m", "verl_avar.cli"]
        call += words(data, out, "--server", killed.url, "--concurrency", "2", "--served-model", SERVED)
        client = subprocess.Popen(call, stderr=subprocess.PIPE, text=True)
        wait_for_records(out, 5)
        killed.kill(killed.process("api"))
        said = client.communicate(timeout=120)[1]
    assert client.returncode == 2 and said.startswith(f"avar intervene: the server at {killed.url}")
    done = read(out)
    assert 5 <= len(done) < 6 * 18
    asked = server.metrics()["vllm:request_success_total/stop"]
    assert main(words(data, out, "--server", server.url)) == 1
    same(read(out), expected)
    assert server.metrics()["vllm:request_success_total/stop"] - asked <= 6 * 16 - len(done)


def wait_for_records(out, count):
    path, end = out / "records.jsonl", time.monotonic() + 180
    while not path.exists() or len(path.read_text(encoding="utf-8").splitlines()) < count:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_killed_sweep_leaves_no_engine_behind(data, expected, tmp_path, scratch):
    """SIGKILL of the sweep alone: its engine ends by itself, with its shared memory and its sockets."""
    out = tmp_path / "out"
    call = [sys.executable, "-m", "verl_avar.cli"]
    call += words(data, out, "--backend", "vllm", "--concurrency", "2", *ENGINE)
    sweep = subprocess.Popen(call, env=os.environ | {"TMPDIR": str(scratch)}, stderr=subprocess.PIPE, text=True)
    wait_for_records(out, 3)
    processes = psutil.Process(sweep.pid).children(recursive=True)
    shared = {line.split("/dev/shm/")[1] for p in processes for line in maps(p) if "/dev/shm/" in line}
    assert any("EngineCore" in " ".join(p.cmdline()) for p in processes) and shared
    sweep.send_signal(signal.SIGKILL)
    sweep.communicate()
    assert not psutil.wait_procs(processes, timeout=90)[1]
    assert not [name for name in shared if (SHARED / name).exists()]
    assert not list(scratch.glob("avar-vllm-*"))
    done = read(out)
    assert 3 <= len(done) < 6 * 18
    same(done, {at: expected[at] for at in done})


@pytest.fixture
def scratch():
    """A folder with a short path: those of sockets have at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="avar-") as folder:
        yield Path(folder)


def maps(process):
    return Path(f"/proc/{process.pid}/maps").read_text().splitlines()


def test_a_server_without_the_connector_is_named(data, tmp_path, tmp_path_factory, capsys):
    flags = ["--kv-cache-memory-bytes", "64M", "--limit-mm-per-prompt", '{"image": 2, "video": 0}']
    with Server(Path(MODEL), tmp_path_factory.mktemp("stock"), *flags) as stock:
        stock.wait()
        assert main(words(data, tmp_path / "out", "--server", stock.url)) == 2
    err = capsys.readouterr().err
    assert err == (
        f"avar intervene: the server at {stock.url} runs without the visual-attention connector: start it with "
        "`avar serve MODEL`\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["max_model_len=100000"], "max_model_len (100000) is greater than the derived"),
        (["no_such_option=1"], "unexpected keyword argument 'no_such_option'"),
        (["gpu_memory_utilization=1.0", "kv_cache_memory_bytes=null"], "Available memory on node 0"),
    ],
)
def test_an_engine_that_does_not_start_says_why_in_one_line(data, tmp_path, scratch, capfd, monkeypatch, options, says):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    chosen = [word for option in options for word in ("--engine-option", option)]
    assert main(words(data, tmp_path / "out", "--backend", "vllm", *chosen)) == 2
    err = capfd.readouterr().err
    assert err.startswith("avar intervene: vLLM's engine did not start: ") and says in err and err.count("\n") == 1
    assert Path(err.rstrip().rpartition(" ")[2]).is_file()
    assert not (tmp_path / "out").exists()
