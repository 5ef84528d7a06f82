"""Mistakes in a run's inputs are one line each, before anything starts."""

import socket

import pandas as pd
import pytest

from verl_avar.errors import ConfigError
from verl_avar.training import rl, sft
from verl_avar.training.checks import check_files, check_model, check_roles
from verl_avar.training.environment import free_port


def parquet(path, images):
    rows = {"messages": [[{"role": "user", "content": "?"}]] * len(images), "images": images}
    pd.DataFrame(rows).to_parquet(path)
    return str(path)


def test_rows_with_images_pass(tmp_path):
    check_files(parquet(tmp_path / "a.parquet", [[{"bytes": b"png"}]]), ["messages", "images"])


def test_row_without_image_is_counted(tmp_path):
    path = parquet(tmp_path / "a.parquet", [[{"bytes": b"png"}], [], None])
    with pytest.raises(ConfigError, match=r"2 of 3 rows have no image"):
        check_files(path, ["messages", "images"])
    check_files(path, ["messages", "images"], images=None)


def test_rows_without_image_stand_beside_others_where_that_is_allowed(tmp_path):
    some = parquet(tmp_path / "some.parquet", [[{"bytes": b"png"}], []])
    none = parquet(tmp_path / "none.parquet", [[], []])
    check_files([some, none], ["messages", "images"], mixed=True)
    null = parquet(tmp_path / "null.parquet", [[{"bytes": b"png"}], None])
    with pytest.raises(ConfigError, match="images is null in 1 of 2 rows; verl wants an empty list"):
        check_files(null, ["messages", "images"], mixed=True)
    with pytest.raises(ConfigError, match="none of 2 rows has an image"):
        check_files(none, ["messages", "images"], mixed=True)


def test_missing_column_lists_what_is_there(tmp_path):
    with pytest.raises(ConfigError, match="has no column prompt; it has messages, images"):
        check_files(parquet(tmp_path / "a.parquet", [[{"bytes": b"png"}]]), ["prompt", "images"])


def test_missing_broken_and_empty_files(tmp_path):
    broken = tmp_path / "broken.parquet"
    broken.write_text("not parquet")
    empty = parquet(tmp_path / "empty.parquet", [])
    for path, message in [(tmp_path / "none.parquet", "no data file"), (broken, "not a parquet"), (empty, "no rows")]:
        with pytest.raises(ConfigError, match=message):
            check_files(str(path), ["messages"])


def test_role_that_no_template_knows(tmp_path):
    path = parquet(tmp_path / "a.parquet", [[{"bytes": b"png"}]])
    check_roles(path, "messages")
    pd.DataFrame({"messages": [[{"role": "narrator", "content": "?"}]]}).to_parquet(path)
    with pytest.raises(
        ConfigError, match="messages has the role narrator; the roles are assistant, system, tool, user"
    ):
        check_roles(path, "messages")


def test_folder_without_a_model(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        check_model(str(tmp_path))
    check_model("Qwen/Qwen2.5-VL-7B-Instruct")  # a hub name is the hub's to check


def test_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match=f"port {port} is in use"):
            free_port(port)


@pytest.mark.parametrize(("command", "config"), [(sft.main, "sft_cpu"), (rl.main, "rl_cpu")])
def test_command_ends_with_one_line(command, config, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("verl_avar.training.environment.CPU_MACHINE", {})
    model = "actor_rollout_ref.model.path" if config == "rl_cpu" else "model.path"
    assert command(["--config-name", config, f"{model}={tmp_path}", "data.train_files=x"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: model.path: no model in") and "\n" not in error


def test_bad_objective_ends_with_one_line(capsys):
    assert sft.main(["--config-name", "sft_cpu", "engine.avar.alpha=-1"]) == 2
    assert capsys.readouterr().err == "error: avar.alpha: got -1, wanted a number >= 0\n"


def test_reward_file_is_found_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert rl.find_reward("reward_fns/avar.py").is_file()
    with pytest.raises(ConfigError, match=r"no file nowhere\.py"):
        rl.find_reward("nowhere.py")
