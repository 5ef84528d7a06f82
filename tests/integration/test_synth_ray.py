"""Blocks of rows on a real Ray of two workers, by a stage that writes down what it was given; parts of limits; the
command on Ray and without it.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from verl_avar.cli import main
from verl_avar.data.schema import ROWS
from verl_avar.errors import ConfigError
from verl_avar.miniature.data import write_questions
from verl_avar.miniature.teacher_server import Teacher
from verl_avar.synthesis import ray_data
from verl_avar.synthesis.config import Budget, Endpoint
from verl_avar.synthesis.ray_data import _blocks, _read, divided, run_on_ray

N = 23


def settings(**budget):
    endpoint = Endpoint(base_url="http://127.0.0.1:1/v1", concurrency=16, requests_per_minute=100.0)
    given = {"endpoints": {"one": OmegaConf.structured(endpoint)}, "budget": OmegaConf.structured(Budget(**budget))}
    return OmegaConf.create(given)


def test_limits_and_what_is_left_of_the_budget_are_divided():
    config = settings(tokens=1_000_000, cost=10.0)
    part = divided(config, 3, spent_tokens=99_999, spent_cost=4.0)
    one = part.endpoints.one
    assert one.concurrency == 5  # 3 · 5 = 15 of 16
    assert one.requests_per_minute == pytest.approx(100 / 3) and one.tokens_per_minute is None
    assert part.budget.tokens == 300_000  # of 900,001
    assert part.budget.cost == pytest.approx(2.0)
    assert config.endpoints.one.concurrency == 16 and config.budget.tokens == 1_000_000
    assert divided(config, 1) == config
    spent = divided(config, 2, spent_tokens=2_000_000, spent_cost=11.0)
    assert spent.budget.tokens == 0 and spent.budget.cost == 0
    assert divided(settings(), 2).budget.tokens is None
    with pytest.raises(ConfigError, match=r"endpoints\.one\.concurrency is 16, fewer than the 17 workers"):
        divided(config, 17)
    with pytest.raises(ConfigError, match="workers must be at least 1"):
        divided(config, 0)


@pytest.fixture
def out(tmp_path):
    rows = [
        {
            "id": f"{n}",
            "source": "s",
            "source_row": n,
            "question": "<image>?",
            "answer": "1",
            "choices": [],
            "meta": "{}",
        }
        | {"images": [{"bytes": bytes([n])}]}
        for n in range(N)
    ]
    pq.write_table(pa.Table.from_pylist(rows, ROWS), tmp_path / "rows.parquet", row_group_size=10)
    (tmp_path / "calls").mkdir()
    return tmp_path


def test_blocks_hold_every_row_once_and_no_more_than_asked_for(out):
    blocks = list(_blocks(out / "rows.parquet", 4))
    assert [block["rows"] for block in blocks] == [4, 4, 2, 4, 4, 2, 3]
    read = [_read(out / "rows.parquet", block["group"], block["first"], block["rows"]) for block in blocks]
    assert [row["source_row"] for rows in read for row in rows] == list(range(N))


def write_down(config, out, rows, writer):
    """A stand-in for the stages: a line for each row in the writer's shard. Dies, or refuses, at a row when told to."""
    for row in rows:
        marker = out / "die"
        if marker.exists() and row["source_row"] == 12:
            marker.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if (out / "refuse").exists() and row["source_row"] == 12:
            raise ConfigError("no key in OPENAI_API_KEY")
        line = {"row": row["source_row"], "image": row["images"][0]["bytes"][0], "pid": os.getpid()}
        line |= {"concurrency": config.endpoints.one.concurrency, "tokens": config.budget.tokens}
        with (out / "calls" / f"{writer}.jsonl").open("a") as shard:
            shard.write(json.dumps(line) + "\n")
    return {"accepted": len(rows), "tokens": 10 * len(rows), "cost": 0.5}


def lines(out):
    return {
        shard.name: [json.loads(line) for line in shard.read_text().splitlines()] for shard in (out / "calls").iterdir()
    }


def test_a_run_that_is_asked_to_stop_ends_with_the_block_at_hand(out, monkeypatch):
    monkeypatch.setattr(ray_data, "_start", lambda address, workers: None)
    monkeypatch.setattr(ray_data, "_results", lambda *given: (result for result in [(3, {"accepted": 3})] * 2))
    told = []
    counts = run_on_ray(settings(), out, write_down, progress=told.append, stopped=lambda: len(told) == 1)
    assert counts == {"accepted": 3} and told == [3]


def drive(out):
    """Three runs on the Ray that the first one starts, in a process of its own; prints what they said."""
    import psutil

    told, listening, shutdowns = [], set(), []

    def progress(rows):
        import ray  # not before the run, which keeps it to the loopback

        if not told:
            shutdowns.append(ray.shutdown)
            ray.shutdown = lambda: None  # the other runs have the same Ray
        told.append(rows)
        ours = {process.pid for process in psutil.Process().children(recursive=True)}
        found = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in ours]
        listening.update(c.laddr.ip for c in found)

    first = run_on_ray(settings(tokens=1000), out, write_down, None, 2, block=3, progress=progress)
    shards = lines(out)
    (out / "die").touch()
    second = run_on_ray(settings(), out, write_down, None, 2, block=3)
    (out / "refuse").touch()
    try:
        run_on_ray(settings(), out, write_down, None, 2, block=3)
    except ConfigError as error:
        refusal = str(error)
    shutdowns[0]()
    print(json.dumps([first, told, sorted(listening), shards, second, refusal]))


def test_all_rows_run_once_a_dead_worker_is_replaced_and_a_refusal_is_one_line(out):
    command = [sys.executable, __file__, str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=200, check=True)
    first, told, listening, shards, second, refusal = json.loads(done.stdout.splitlines()[-1])
    assert first == {"accepted": N, "tokens": 10 * N, "cost": pytest.approx(0.5 * 9)}
    assert sorted(told) == [1, 1, 3, 3, 3, 3, 3, 3, 3]  # row groups of 10, 10 and 3 in pieces of 3
    assert listening and {ip.removeprefix("::ffff:") for ip in listening} <= {"127.0.0.1", "::1"}
    written = [line for shard in shards.values() for line in shard]
    assert sorted(line["row"] for line in written) == list(range(N))
    assert all(line["image"] == line["row"] and line["concurrency"] == 8 for line in written)
    workers = {}  # by process, the lines of each of its blocks in order
    for name, shard in shards.items():
        worker, number = re.fullmatch(r"(ray-[0-9a-f]{8})-(\d+)\.jsonl", name).groups()
        workers.setdefault(worker, {})[int(number)] = shard
    assert 1 <= len(workers) <= 2 and len(shards) == 9
    for blocks in workers.values():
        assert len({line["pid"] for shard in blocks.values() for line in shard}) == 1
        left = 500  # half the budget, less 10 for every row that this worker had
        for number in range(len(blocks)):
            assert {line["tokens"] for line in blocks[number]} == {left}
            left -= 10 * len(blocks[number])
    assert second["accepted"] == N and not (out / "die").exists()
    rows = {line["row"] for name, shard in lines(out).items() if name not in shards for line in shard}
    assert rows == set(range(N))
    assert refusal == "no key in OPENAI_API_KEY"


def test_the_command_makes_the_same_on_ray_as_without(tmp_path):
    questions = write_questions(tmp_path / "questions.parquet", 100, seed=0)  # row groups of 64 and 36: two blocks
    recipe = Path(__file__).parents[2] / "recipes" / "synthesis" / "miniature.yaml"
    faults = {"server_error": 0.05, "wrong_answer": 0.1, "leak": 0.1, "refusal": 0.05}
    with Teacher(faults) as teacher:
        given = [str(recipe), f"sources=[{{path: '{questions}'}}]", f"endpoints.teacher.base_url={teacher.url}"]
        assert main(["synth", "run", *given, f"out={tmp_path / 'alone'}"]) == 0
        command = [sys.executable, "-m", "verl_avar.cli", "synth", "run", *given, f"out={tmp_path / 'ray'}"]
        command += ["--ray", "local", "--workers", "2"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=200, check=True)
    alone, ray = (pq.read_table(tmp_path / name / "outcomes.parquet") for name in ("alone", "ray"))
    assert ray.equals(alone)
    counts = json.loads((tmp_path / "ray" / "summary.json").read_text())
    assert counts["rejected"] > 0 and counts["accepted"] + counts["rejected"] == 100
    assert f"{counts['accepted']} of 100 rows accepted" in done.stdout and "--ray local --workers 2" in done.stdout
    shards = [path.name for path in (tmp_path / "ray" / "calls").iterdir()]
    assert len(shards) == 2 and all(name.startswith("ray-") for name in shards)
    lines = [line for path in (tmp_path / "ray" / "calls").iterdir() for line in path.read_text().splitlines()]
    assert len(lines) == len({json.loads(line)["key"] for line in lines}) == sum(alone["calls"].to_pylist())


if __name__ == "__main__":
    drive(Path(sys.argv[1]))
