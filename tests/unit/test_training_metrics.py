"""Step metrics and checkpoints on disk, over resumed runs; the watchdog; the reward's parts."""

import json
import subprocess
import sys
import time

import psutil
import pytest

from verl_avar.training.checkpoint import latest_model, latest_step
from verl_avar.training.metrics import log_to, log_to_unless_told, read_steps
from verl_avar.training.watchdog import watch


def write(file, steps, end="\n"):
    lines = [json.dumps({"step": step, "data": {"loss": loss}}) for step, loss in steps]
    file.write_text("\n".join(lines) + end)


@pytest.fixture(autouse=True)
def no_logger(monkeypatch):
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", "")
    monkeypatch.delenv("VERL_FILE_LOGGER_PATH")


def test_later_attempts_win_and_earlier_ones_stay(tmp_path):
    file = tmp_path / "run" / "metrics.jsonl"
    log_to(file)
    write(file, [(1, 0.1), (2, 0.2), (3, 0.3)])
    log_to(file)
    write(file, [(2, 20.0)])
    log_to(file)
    write(file, [(3, 30.0), (4, 40.0)])
    assert [(step["step"], step["loss"]) for step in read_steps(file)] == [(1, 0.1), (2, 20.0), (3, 30.0), (4, 40.0)]


def test_half_a_line_is_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    write(file, [(1, 0.1)], end='\n{"step": 2, "data": {"lo')
    assert [step["step"] for step in read_steps(file)] == [1]


def test_no_file_means_no_steps(tmp_path):
    assert read_steps(tmp_path / "metrics.jsonl") == []


def test_the_starter_of_a_process_chooses_the_file(tmp_path, monkeypatch):
    import os

    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", "chosen.jsonl")
    log_to_unless_told(tmp_path / "metrics.jsonl")
    assert os.environ["VERL_FILE_LOGGER_PATH"] == "chosen.jsonl"


@pytest.mark.parametrize("inside", [f"{part}huggingface" for part in ("", "actor/", "model/", "actor/model/")])
def test_newest_whole_checkpoint_is_found(tmp_path, inside):
    for step in (4, 8):
        model = tmp_path / f"global_step_{step}" / inside
        model.mkdir(parents=True)
        (model / "config.json").touch()
        (model / "model.safetensors").touch()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")  # 8 was not finished
    assert latest_step(tmp_path) == 4
    assert latest_model(tmp_path) == tmp_path / "global_step_4" / inside


def test_missing_checkpoints_say_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        latest_model(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    with pytest.raises(FileNotFoundError, match="add hf_model"):
        latest_model(tmp_path)


def test_stalled_run_is_ended_once(tmp_path):
    ended = []
    with watch([tmp_path], stall_s=0.2, every_s=0.05, end=ended.append):
        time.sleep(0.6)
    assert len(ended) == 1 and "no step and no checkpoint" in ended[0]


def test_run_that_writes_goes_on(tmp_path):
    ended = []
    with watch([tmp_path], stall_s=0.4, every_s=0.05, end=ended.append):
        for step in range(8):
            (tmp_path / "metrics.jsonl").write_text(str(step))
            time.sleep(0.1)
    assert not ended


def test_stalled_process_ends_with_its_children(tmp_path):
    script = (
        "import subprocess, sys, time\n"
        "from verl_avar.training.watchdog import watch\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "print(child.pid, flush=True)\n"
        f"with watch([{str(tmp_path)!r}], stall_s=0.1, every_s=0.05):\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert done.returncode == 3 and done.stderr.startswith("error: no step")
    assert not psutil.pid_exists(int(done.stdout))


def test_reward_parts_are_means_over_rollouts():
    from verl_avar.training.rl_trainer import reward_means

    rollouts = [{"acc": 1.0, "visual": 0.5, "pred": "red"}, {"acc": 0, "visual": 0.0, "pred": ""}]
    assert reward_means(rollouts) == {"reward/acc": 0.5, "reward/visual": 0.25}
    assert reward_means([]) == {}
