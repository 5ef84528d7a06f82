"""Blocks of rows on a real Ray of two workers, by a stage that writes down what it was given; parts of limits."""

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

from verl_avar.data.schema import ROWS
from verl_avar.errors import ConfigError
from verl_avar.synthesis.config import Budget, Endpoint
from verl_avar.synthesis.ray_data import _blocks, _read, _start, divided, run_on_ray

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
            raise ConfigError("no key in OPENAI_API_KEY\nof row 12")
        line = {"row": row["source_row"], "image": row["images"][0]["bytes"][0], "pid": os.getpid()}
        line |= {"concurrency": config.endpoints.one.concurrency, "tokens": config.budget.tokens}
        with (out / "calls" / f"{writer}.jsonl").open("a") as shard:
            shard.write(json.dumps(line) + "\n")
    return {"accepted": len(rows), "tokens": 10 * len(rows), "cost": 0.5}


def lines(out):
    return {
        shard.name: [json.loads(line) for line in shard.read_text().splitlines()] for shard in (out / "calls").iterdir()
    }


def drive(out):
    """Three runs, in a process of its own; prints what they said. The second and the third share a Ray."""
    import psutil

    told, listening = [], set()

    def progress(rows):
        told.append(rows)
        for process in psutil.Process().children(recursive=True):
            listening.update(c.laddr.ip for c in process.net_connections("tcp") if c.status == "LISTEN")

    first = run_on_ray(settings(tokens=1000), out, write_down, None, 2, block=3, progress=progress)
    shards = lines(out)
    import ray  # not before the first run, which keeps it to the loopback

    assert not ray.is_initialized()
    _start(None, 2)
    (out / "die").touch()
    second = run_on_ray(settings(), out, write_down, None, 2, block=3)
    (out / "refuse").touch()
    try:
        run_on_ray(settings(), out, write_down, None, 2, block=3)
    except ConfigError as error:
        refusal = str(error)
    ray.shutdown()
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
    assert 1 <= len(shards) <= 2 and all(re.fullmatch(r"ray-[0-9a-f]{8}\.jsonl", name) for name in shards)
    for shard in shards.values():  # of one process; its budget of 500 sinks by what its blocks spent
        assert len({line["pid"] for line in shard}) == 1
        left = list(dict.fromkeys(line["tokens"] for line in shard))
        assert left[0] == 500 and left == sorted(left, reverse=True) and 500 - left[-1] <= 10 * len(shard)
    assert second["accepted"] == N and not (out / "die").exists()
    rows = {line["row"] for name, shard in lines(out).items() if name not in shards for line in shard}
    assert rows == set(range(N))
    assert refusal == "no key in OPENAI_API_KEY"


if __name__ == "__main__":
    drive(Path(sys.argv[1]))
