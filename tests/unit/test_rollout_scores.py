"""The shared score file: engines of one name, killed engines, and folders that have no room or can't be written."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from verl_avar.rollout import scores
from verl_avar.rollout.scores import SharedScores

KILLED_WHILE_STARTING = """
import os, signal, sys
from pathlib import Path
from verl_avar.rollout import scores
scores.shared_folder = lambda: Path(sys.argv[1])
scores.SharedScores.create("engine", 4)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "shared_folder", lambda: tmp_path)
    return tmp_path


def _start(engine_id, rows, value):
    """A writer and its reader, as an engine starts them; every score is `value`."""
    writer = SharedScores.create(engine_id, rows)
    writer.array[:] = value
    return writer, lambda: SharedScores.open(engine_id)


def test_engines_of_one_name_that_start_together_wait_for_each_other_and_keep_their_own_scores(folder, caplog):
    read = {}

    def start(value):
        writer, open_it = _start("same", 8, value)
        time.sleep(0.3)  # the model warms up
        read[value] = writer, open_it()

    threads = [threading.Thread(target=start, args=(float(value),)) for value in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {value: reader.array.max() for value, (_, reader) in read.items()} == {0.0: 0.0, 1.0: 1.0, 2.0: 2.0}
    assert "waiting for another engine with engine_id same" in caplog.text
    assert not list(folder.iterdir())


def test_an_engine_that_ends_leaves_the_name_of_its_successor_alone(folder):
    old, open_old = _start("same", 8, 1.0)
    open_old()
    new, open_new = _start("same", 8, 2.0)
    old.close()
    assert open_new().array.min() == 2.0
    new.close()


def test_a_name_that_stays_taken_is_refused_with_the_setting_to_change(folder, monkeypatch):
    monkeypatch.setattr(scores, "_WAIT_S", 0.2)
    first, open_first = _start("same", 8, 1.0)
    with pytest.raises(RuntimeError, match=r"a kv_transfer_config\.engine_id of its own"):
        SharedScores.create("same", 8)
    assert open_first().array.min() == 1.0
    assert not list(folder.iterdir())
    first.close()


def test_after_a_kill_while_starting_the_same_engine_starts_again_at_once(folder):
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_STARTING, str(folder)], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in folder.iterdir()] == ["avar-scores-engine"]
    _, open_it = _start("engine", 8, 3.0)
    assert open_it().array.shape[0] == 8
    assert not list(folder.iterdir())


def test_what_others_put_there_is_left_alone_and_stops_no_engine(folder, monkeypatch):
    """In a shared-memory folder of several users: a link with our prefix, and a file that only its owner may remove."""
    (folder / "private").write_bytes(b"theirs")
    (folder / "avar-scores-link").symlink_to(folder / "private")
    (folder / "avar-scores-theirs").touch()
    unlink = Path.unlink

    def refused(path, **how):
        if path.name == "avar-scores-theirs":
            raise PermissionError
        return unlink(path, **how)

    monkeypatch.setattr(Path, "unlink", refused)
    _, open_it = _start("engine", 8, 3.0)
    assert open_it().array.shape[0] == 8
    assert {path.name for path in folder.iterdir()} == {"private", "avar-scores-link", "avar-scores-theirs"}


def test_a_full_folder_names_the_size_and_leaves_nothing():
    folder = scores.shared_folder()
    before = set(folder.iterdir())
    room = os.statvfs(folder)
    rows = 2 * room.f_blocks * room.f_frsize // (4 * scores.COLUMNS)
    with pytest.raises(OSError, match=r"attention scores need \d+ MiB in .*--shm-size"):
        SharedScores.create("unit-huge", rows)
    assert not [path for path in set(folder.iterdir()) - before if path.name.startswith("avar-")]


def test_a_folder_that_cannot_be_written_is_named(folder, monkeypatch):
    monkeypatch.setattr(scores, "shared_folder", lambda: folder / "missing")
    with pytest.raises(OSError, match=r"missing \(No such file or directory\): let this user write there"):
        SharedScores.create("unit", 8)


def test_the_memory_goes_with_the_last_view_of_it(folder):
    def open_files():
        return sum(
            str(folder) in os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)
        )

    writer, open_it = _start("engine", 8, 1.0)
    reader = open_it()
    assert open_files() == 2
    writer.close()
    view = reader.array[2:]
    del writer, reader
    assert open_files() == 1
    assert view.min() == 1.0
    del view
    assert open_files() == 0


def _is_open(fd):
    return os.path.lexists(f"/proc/self/fd/{fd}")
