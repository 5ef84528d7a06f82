"""The recipe runner: settings, checks, and trainer processes, with stand-in trainers."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

import pandas as pd
import preflight
import psutil
import pytest
import run
import settings
from conftest import ROOT
from rich.console import Console
from settings import SettingsError, load
from trainer_process import METRICS, StageFailed, end_leftover, run_trainer

from verl_avar.training.metrics import read_steps

TINY = ROOT / "recipes" / "avar_tiny_cpu.yaml"


@pytest.mark.parametrize(
    "overrides,message",
    [
        (["rl.stepz=3"], "stepz"),
        (["rl.steps=many"], "many"),
        (["nonsense"], "not an override"),
        (["agto.gamma=1"], "gamma"),
    ],
)
def test_bad_settings_are_one_line(overrides, message):
    with pytest.raises(SettingsError, match=message) as error:
        load(TINY, overrides)
    assert "\n" not in str(error.value)


def test_stages_keep_their_order_and_unknown_ones_are_named():
    assert preflight.chosen_stages("report,data") == ["data", "report"]
    assert preflight.chosen_stages(None) == list(settings.STAGES)
    with pytest.raises(SettingsError, match="unknown stage 'train'"):
        preflight.chosen_stages("data,train")


def run_recipe(*arguments) -> subprocess.CompletedProcess:
    """The runner's command line in this process: importing verl for each would take minutes."""
    before, out, err = signal.getsignal(signal.SIGTERM), io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            status = run.main([str(TINY), *map(str, arguments)])
    finally:
        signal.signal(signal.SIGTERM, before)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["needs.disk_gib=1e9"], "GiB free, the run needs"),
        (["needs.memory_gib=1e9"], "GiB of memory are available"),
        (["base=./no_such_model"], "no model in"),
        (["data.sft=nowhere.parquet"], "no data file"),
        (["rl.overrides=[trainer.no_such_key=1]"], "no_such_key"),
        (["--stages", "dance"], "unknown stage 'dance'"),
        (["--stages", "rl"], "stage 'rl' needs 'data'"),
        (["--stages", "report"], "stage 'report' needs 'data'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, arguments, message):
    result = run_recipe("--out", tmp_path / "run", *arguments)
    assert result.returncode == run.EXIT_BAD_INPUT
    assert message in result.stderr and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.fixture
def own_rows(tmp_path):
    """Writes rows of a kind, `changes` made to one each, as the user's own file; returns the override."""

    def write(kind, *changes):
        column = preflight.COLUMNS[kind]
        row = {column: [{"role": "user", "content": "<image>Hello"}], "images": [{"bytes": b"x"}]}
        pd.DataFrame([row | change for change in changes]).to_parquet(tmp_path / "mine.parquet")
        return f"data.{kind}={tmp_path / 'mine.parquet'}"

    return write


BARE = {"images": []}


@pytest.mark.parametrize(
    "kind,changes,message",
    [
        ("rl", [{}, BARE], "data.rl: .* 1 of 2 rows have no image"),
        ("eval", [{}, BARE], "data.eval: .* 1 of 2 rows have no image"),
        ("sft", [BARE, BARE], "data.sft: none of 2 rows has an image"),
        ("sft", [{}, {"messages": [{"role": "robot", "content": "<image>Hello"}]}], "robot"),
    ],
)
def test_bad_rows_of_the_users_own_data_are_one_line(tmp_path, own_rows, kind, changes, message):
    result = run_recipe("--out", tmp_path / "run", own_rows(kind, *changes))
    assert result.returncode == run.EXIT_BAD_INPUT and re.search(message, result.stderr)
    assert len(result.stderr.strip().splitlines()) == 1 and not (tmp_path / "run").exists()


def test_rows_of_the_cold_start_may_lack_an_image_beside_others(own_rows):
    preflight.check_data(load(TINY, [own_rows("sft", {}, BARE)]), "sft", "messages")


def test_a_port_in_use_is_one_line(tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(taken.getsockname()[1])
        try:
            with pytest.raises(SettingsError, match=r"MASTER_PORT: port \d+ is in use"):
                preflight.check_port()
        finally:
            del os.environ["MASTER_PORT"]


def test_data_stage_runs_once_and_refuses_other_settings(tmp_path):
    out = tmp_path / "run"
    small = ["data.sft_rows=8", "data.rl_rows=8", "data.eval_rows_per_task=2"]
    first = run_recipe("--out", out, "--stages", "data", *small)
    assert first.returncode == 0, first.stderr
    made = (out / "data" / "sft.parquet").stat().st_mtime_ns
    again = run_recipe("--out", out, "--stages", "data", *small)
    assert again.returncode == 0 and "skipped" in again.stdout
    assert (out / "data" / "sft.parquet").stat().st_mtime_ns == made
    other = run_recipe("--out", out, "--stages", "data", "data.sft_rows=9")
    assert other.returncode == run.EXIT_BAD_INPUT and "settings of stage 'data' differ" in other.stderr
    # Also where the stage that differs is not among those asked for.
    later = run_recipe("--out", out, "--stages", "coldstart", "data.sft_rows=9")
    assert later.returncode == run.EXIT_BAD_INPUT and "settings of stage 'data' differ" in later.stderr


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with run.only_run(tmp_path), pytest.raises(SettingsError, match="another run is using"), run.only_run(tmp_path):
        pass


def trainer(folder, code: str, **options):
    folder.mkdir(exist_ok=True)
    defaults = {"total_steps": 3, "describe": lambda step: f"loss {step['loss']}"}
    console = Console(file=open(folder / "terminal.txt", "a"), width=120)  # noqa: SIM115
    command = [sys.executable, "-c", code]
    run_trainer(command, folder, console=console, **(defaults | options))
    console.file.flush()
    return (folder / "terminal.txt").read_text()


WRITE_STEPS = """
import json, os
with open(os.environ["VERL_FILE_LOGGER_PATH"], "w") as f:
    for step in range({first}, {last} + 1):
        print(json.dumps({{"step": step, "data": {{"loss": step / 10}}}}), file=f)
"""


def test_steps_reach_the_terminal_and_survive_a_second_start(tmp_path):
    shown = trainer(tmp_path / "sft", WRITE_STEPS.format(first=1, last=2))
    assert "sft: step 2/3  loss 0.2" in shown
    trainer(tmp_path / "sft", WRITE_STEPS.format(first=2, last=3))
    assert read_steps(tmp_path / "sft" / METRICS) == [{"step": s, "loss": s / 10} for s in (1, 2, 3)]
    assert not (tmp_path / "sft" / "process.json").exists()


def test_a_failing_trainer_is_told_by_its_own_error_line(tmp_path):
    code = "print('(Worker pid=12, ip=1.2.3.4) ray noise'); raise ValueError('the batch is too small')"
    with pytest.raises(
        StageFailed, match=r"sft: ValueError: the batch is too small \(exit 1; all of it in .*log.txt\)"
    ):
        trainer(tmp_path / "sft", code)


def test_a_trainers_own_error_line_comes_before_what_it_logged(tmp_path):
    code = "import sys; print('ValueError: noise of a worker'); print('error: no data file x.parquet'); sys.exit(2)"
    with pytest.raises(StageFailed, match=r"sft: no data file x.parquet \(exit 2"):
        trainer(tmp_path / "sft", code)


def test_children_of_a_failed_trainer_are_ended(tmp_path):
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        "print(child.pid, flush=True); time.sleep(3); sys.exit(1)"
    )
    with pytest.raises(StageFailed, match="exit 1"):
        trainer(tmp_path / "rl", code)
    assert not psutil.pid_exists(int((tmp_path / "rl" / "log.txt").read_text()))


def test_a_trainer_left_by_a_killed_runner_is_ended(tmp_path):
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    created = psutil.Process(left.pid).create_time()
    record = {"pid": left.pid, "created": created, "started": time.time()}
    (tmp_path / "process.json").write_text(json.dumps(record))
    end_leftover(tmp_path)
    assert not psutil.pid_exists(left.pid)
    # A pid that another program has by now is left alone.
    (tmp_path / "process.json").write_text(json.dumps(record | {"pid": os.getpid()}))
    end_leftover(tmp_path)
    assert not (tmp_path / "process.json").exists()
