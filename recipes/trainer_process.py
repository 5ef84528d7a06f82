"""Runs one trainer as a child process: its log in a file, its steps on the terminal, and no process left behind."""

from __future__ import annotations

import contextlib
import ctypes
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
from files import read_json, write_json
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from verl_avar.training.metrics import log_to, read_steps
from verl_avar.training.processes import descendants, end_processes
from verl_avar.training.shared_memory import remove_segments
from verl_avar.training.stopping import EXIT_STOPPED

METRICS = "metrics.jsonl"
POLL_SECONDS = 0.5
LINES_PER_RUN = 20  # step lines where the output is not a terminal


class StageFailed(Exception):
    """A stage that could not go on: one line for the user."""


def run_trainer(
    command: Sequence[str],
    folder: Path,
    *,
    total_steps: int,
    describe: Callable[[dict], str],
    console: Console,
) -> None:
    """Runs `command` to its end.

    folder: gets `log.txt` (all output), `metrics.jsonl` (a line a step; those of earlier starts stay beside it) and,
    while it runs, `process.json`.
    describe: a step's metrics -> what to show of them. Raises StageFailed with the trainer's own error line.
    SIGTERM is handed on to the trainer, which saves a checkpoint; KeyboardInterrupt is raised when it has left.
    """
    end_leftover(folder)
    metrics, log = folder / METRICS, folder / "log.txt"
    log_to(metrics)
    started, log_start = time.time(), log.stat().st_size if log.exists() else 0
    with log.open("ab") as output:
        child = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True, preexec_fn=_die_with_parent,
        )  # fmt: skip
    process = psutil.Process(child.pid)
    record = {"pid": child.pid, "created": process.create_time(), "started": started}
    write_json(folder / "process.json", record)
    family: set[psutil.Process] = {process}
    steps = _Steps(metrics, total_steps, folder.name, describe, console)
    try:
        with steps, _sigterm_goes_to(child):
            while child.poll() is None:
                family |= descendants(process)
                steps.update()
                time.sleep(POLL_SECONDS)
            steps.update()
    finally:
        end_processes(family)
        child.wait()
        remove_segments(started)
        (folder / "process.json").unlink(missing_ok=True)
    if child.returncode in (EXIT_STOPPED, -signal.SIGTERM):  # the latter before it could listen
        raise KeyboardInterrupt
    if child.returncode != 0:
        raise StageFailed(f"{folder.name}: {_error_line(log, log_start)} (exit {child.returncode}; all of it in {log})")


def end_leftover(folder: Path) -> None:
    """Ends a trainer that an earlier, killed run left in this folder, and removes its shared memory."""
    path = folder / "process.json"
    if not path.exists():
        return
    record = read_json(path)
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(record["pid"])
        if process.create_time() == record["created"]:  # else the pid is somebody else's by now
            end_processes({process} | descendants(process))
    remove_segments(record["started"])
    path.unlink()


@contextlib.contextmanager
def _sigterm_goes_to(child: subprocess.Popen) -> Iterator[None]:
    """The first SIGTERM; the next ones do what they did before."""

    def hand_on(*_) -> None:
        signal.signal(signal.SIGTERM, before)
        child.terminate()

    before = signal.signal(signal.SIGTERM, hand_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _die_with_parent() -> None:
    # Without this a killed runner would leave its trainer training (Linux only; elsewhere end_leftover does it). It
    # saves a checkpoint first.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _error_line(log: Path, start: int) -> str:
    """The trainer's own last error line, or else the last line that names one, without Ray's prefix and colours."""
    with log.open("rb") as file:
        file.seek(start)
        text = file.read().decode(errors="replace")
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [re.sub(r"^\([^)]*pid=[^)]*\)\s*", "", line).strip() for line in text.splitlines()]
    errors = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception|Interrupt)\b.*: \S", line)]
    own = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (own or errors or [line for line in lines if line] or ["ended without a word"])[-1][:300]


class _Steps:
    """Shows the steps of a metrics file as they come: a bar on a terminal, some lines elsewhere."""

    def __init__(self, path: Path, total: int, name: str, describe, console: Console):
        self.path, self.total, self.name, self.describe, self.console = path, total, name, describe, console
        self.shown, self.size = 0, -1
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, TextColumn("{task.fields[figures]}"), console=console)

    def __enter__(self):
        if self.console.is_terminal:
            self.bar.start()
            self.task = self.bar.add_task(f"{self.name}: starting", total=self.total, figures="")
        else:
            self.console.print(f"{self.name}: starting, {self.total} steps")
        return self

    def __exit__(self, *_):
        self.bar.stop()

    def update(self) -> None:
        size = self.path.stat().st_size if self.path.exists() else -1
        if size == self.size:
            return
        self.size = size
        steps = read_steps(self.path)
        if not steps:
            return
        step, figures = steps[-1]["step"], self.describe(steps[-1])
        if self.console.is_terminal:
            self.bar.update(self.task, completed=step, description=self.name, figures=figures)
        elif step >= self.shown + max(1, self.total // LINES_PER_RUN) or (step == self.total and step > self.shown):
            self.console.print(f"{self.name}: step {step}/{self.total}  {figures}", highlight=False)
            self.shown = step
