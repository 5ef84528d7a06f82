"""Stored calls: found by key, whole after a kill, kept apart between processes."""

import json
import random
import signal
import subprocess
import sys

import pytest

from verl_avar.calls.store import Lines, Writer, call_key, locked, writer_name
from verl_avar.errors import ConfigError

ENDLESS = """
import sys
from pathlib import Path
from verl_avar.calls.store import Writer, call_key
writer = Writer(Path(sys.argv[1]), sys.argv[2])
print("ready", flush=True)
for number in range(10**9):
    writer.add(call_key(sys.argv[2], number), {"number": number, "text": "x" * 2000})
"""


def test_every_call_is_found_by_its_key_and_no_other(tmp_path):
    rng = random.Random(0)
    keys = [call_key("call", number) for number in range(500)]
    for name in ("a", "b"):
        writer = Writer(tmp_path, name)
        for number in range(0 if name == "a" else 1, 500, 2):
            writer.add(keys[number], {"number": number, "text": "ä\n" * rng.randrange(50)})
        writer.close()
    with Lines(tmp_path) as lines:
        assert len(lines) == 500
        assert [lines.get(key)["number"] for key in keys] == list(range(500))
        assert lines.get(call_key("call", 500)) is None
        assert sorted(call["number"] for call in lines) == list(range(500))


def test_keys_depend_on_every_part_and_not_on_the_order_of_names():
    assert call_key("a", {"x": 1, "y": 2}) == call_key("a", {"y": 2, "x": 1})
    assert len({call_key("a", "b"), call_key("ab"), call_key("a", ["b"]), call_key("a", "c")}) == 4


def test_of_two_answers_to_one_call_the_first_counts(tmp_path):
    key = call_key("x")
    for name, text in (("0002", "later"), ("0001", "earlier")):
        writer = Writer(tmp_path, name)
        writer.add(key, {"text": text})
        writer.add(key, {"text": "again"})
        writer.close()
    with Lines(tmp_path) as lines:
        assert lines.get(key)["text"] == "earlier"
        assert [call["text"] for call in lines] == ["earlier"]


def test_a_torn_line_is_passed_over_and_the_next_writer_leaves_it_alone(tmp_path):
    writer = Writer(tmp_path, "a")
    writer.add(call_key(1), {"text": "whole"})
    writer.close()
    torn = tmp_path / "a-00000.jsonl"
    with torn.open("ab") as file:
        file.write(b'{"key": "' + call_key(2).encode() + b'", "text": "to')
    before = torn.read_bytes()
    writer = Writer(tmp_path, "b")
    writer.add(call_key(2), {"text": "asked again"})
    writer.close()
    with Lines(tmp_path) as lines:
        assert lines.get(call_key(1))["text"] == "whole" and lines.get(call_key(2))["text"] == "asked again"
    assert torn.read_bytes() == before


def test_shards_are_limited_in_size(tmp_path, monkeypatch):
    monkeypatch.setattr("verl_avar.calls.store.SHARD_BYTES", 1000)
    writer = Writer(tmp_path, "a")
    for number in range(20):
        writer.add(call_key(number), {"text": "x" * 200})
    writer.close()
    shards = sorted(tmp_path.iterdir())
    assert len(shards) == 7 and all(shard.stat().st_size <= 1000 for shard in shards)
    with Lines(tmp_path) as lines:
        assert len(lines) == 20


def test_killed_writers_leave_whole_lines_and_lose_none_that_were_written(tmp_path):
    running = [
        subprocess.Popen([sys.executable, "-c", ENDLESS, str(tmp_path), name], stdout=subprocess.PIPE, text=True)
        for name in ("a", "b")
    ]
    try:
        for process in running:
            assert process.stdout.readline() == "ready\n"
        while sum(path.stat().st_size for path in tmp_path.iterdir()) < 4 * 2**20:
            pass
    finally:
        for process in running:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
    with Lines(tmp_path) as lines:
        for name in ("a", "b"):
            shard = tmp_path / f"{name}-00000.jsonl"
            whole = [json.loads(line) for line in shard.read_bytes().split(b"\n")[:-1]]
            assert [lines.get(call_key(name, number))["number"] for number in range(len(whole))] == [
                call["number"] for call in whole
            ]


def test_a_second_run_in_one_folder_is_refused_by_name_until_the_first_ends(tmp_path):
    with (
        locked(tmp_path),
        pytest.raises(ConfigError, match=r"a run is writing here \(pid \d+ on "),
        locked(tmp_path),
    ):
        pass
    with locked(tmp_path):
        pass


def test_writers_names_sort_by_time():
    names = [writer_name() for _ in range(3)]
    assert names == sorted(names) and len(set(names)) == 3
