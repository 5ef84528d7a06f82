"""Parquet files of the miniature: verl's columns, one picture a row, whole or absent."""

import io
import re

import pyarrow.parquet as pq
import pytest
from PIL import Image

from verl_avar.miniature import data
from verl_avar.miniature.tasks import TASKS


def test_sft_rows_have_verl_columns_and_one_picture(tmp_path):
    rows = pq.read_table(data.write_sft(tmp_path / "sft.parquet", 8, seed=0)).to_pylist()
    assert len(rows) == 8
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        assert [message["content"].count("<image>") for message in row["messages"]] == [0, 1, 0]
        answer = re.fullmatch(r"<think>.+</think><answer>(.+)</answer>", row["messages"][2]["content"])[1]
        assert answer == row["answer"]
        assert Image.open(io.BytesIO(row["images"][0]["bytes"])).size == (84, 84)
    assert sorted({row["task"] for row in rows}) == sorted(TASKS)


def test_rl_and_eval_rows_carry_the_rule_and_their_split(tmp_path):
    rl = pq.read_table(data.write_rl(tmp_path / "rl.parquet", 8, seed=0)).to_pylist()
    evaluation = pq.read_table(data.write_eval(tmp_path / "eval.parquet", 3, seed=0)).to_pylist()
    assert len(evaluation) == 3 * len(TASKS)
    for rows, split in ((rl, "train"), (evaluation, "eval")):
        assert [row["extra_info"]["index"] for row in rows] == list(range(len(rows)))
        for row in rows:
            assert row["data_source"] == f"miniature/{row['extra_info']['task']}"
            assert row["extra_info"]["split"] == split
            assert row["reward_model"]["style"] == "rule" and row["reward_model"]["ground_truth"]
            assert [message["role"] for message in row["prompt"]] == ["system", "user"]


def test_evaluation_pictures_are_distinct_within_a_task_and_absent_from_training(tmp_path):
    evaluation = pq.read_table(data.write_eval(tmp_path / "eval.parquet", 60, seed=1)).to_pylist()
    scenes = {(row["extra_info"]["task"], row["extra_info"]["scene"]) for row in evaluation}
    assert len(scenes) == len(evaluation)
    trained = {row["scene"] for row in pq.read_table(data.write_sft(tmp_path / "sft.parquet", 400, seed=1)).to_pylist()}
    assert not trained & {scene for _, scene in scenes}


def test_files_repeat_by_their_seed(tmp_path):
    files = [data.write_rl(tmp_path / f"{name}.parquet", 6, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    tables = [pq.read_table(file) for file in files]
    assert tables[0].equals(tables[1]) and not tables[0].equals(tables[2])


def test_asking_for_more_pictures_than_there_are_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="task 'digit'"):
        data.write_eval(tmp_path / "eval.parquet", 400, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    path = data.write_rl(tmp_path / "rl.parquet", 4, seed=0)
    before = path.read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(data.pq, "write_table", full)
    with pytest.raises(OSError, match="no space"):
        data.write_rl(path, 8, seed=0)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
