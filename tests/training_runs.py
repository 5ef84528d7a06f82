"""RL runs of the miniature as processes of their own, to be harmed and watched."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from verl_avar.compat.verl_weight_socket import RUN
from verl_avar.training.cluster import LOGGER_FILE
from verl_avar.training.metrics import read_steps
from verl_avar.training.processes import descendants, end_processes
from verl_avar.training.shared_memory import remove_segments

SLOW_AGENTS = ("ray::RuntimeEnvAgent", "ray::DashboardAgent")


class Run:
    """`python -m verl_avar.training.rl --config-name rl_cpu …`, in a session of its own, output and metrics in files.

    As a context manager it leaves no process behind.
    """

    def __init__(self, folder: Path, settings: dict, name: str):
        self.started = time.time()
        self.log, self.metrics = folder / f"{name}.log", folder / f"{name}.jsonl"
        settings = settings | {"avar.metrics_file": self.metrics}
        command = [sys.executable, "-m", "verl_avar.training.rl", "--config-name", "rl_cpu"]
        # What names a run is not handed from one to the next
        environment = {key: value for key, value in os.environ.items() if key not in (LOGGER_FILE, RUN)}
        with self.log.open("wb") as log:
            self.process = psutil.Popen(
                command + [f"{key}={value}" for key, value in settings.items()],
                stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env=environment, cwd=folder, start_new_session=True,
            )  # fmt: skip
        self.family: set[psutil.Process] = set()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.look()
        end_processes({self.process, *self.family})
        remove_segments(self.started)

    def look(self) -> None:
        self.family |= descendants(self.process)

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def last_line(self) -> str:
        return self.said().strip().splitlines()[-1]

    def steps(self) -> list[int]:
        return [step["step"] for step in read_steps(self.metrics)]

    def until(self, happened, limit_s: float = 480) -> None:
        """Waits for `happened()`; fails when the run ends before."""
        limit = time.monotonic() + limit_s
        while not happened():
            self.look()
            assert self.process.poll() is None, self.said()[-6000:]
            assert time.monotonic() < limit, self.said()[-6000:]
            time.sleep(0.2)
        self.look()

    def until_end(self, limit_s: float) -> int:
        """Its exit status."""
        limit = time.monotonic() + limit_s
        while self.process.poll() is None:
            self.look()
            assert time.monotonic() < limit, f"still runs after {limit_s} s: {self.said()[-6000:]}"
            time.sleep(0.2)
        return self.process.returncode

    def kill(self, title: str) -> None:
        """SIGKILL to every process of the run whose title holds `title`."""
        self.look()
        found = [process for process in self.family if title in _title(process)]
        assert found, [_title(process) for process in self.family]
        for process in found:
            process.kill()

    def alive(self) -> list[str]:
        """What is left of the run some seconds after its end, but for agents of Ray that take a minute to notice."""
        for _ in range(100):
            left = [title for process in self.family if (title := _title(process)) and title not in SLOW_AGENTS]
            if not left:
                break
            time.sleep(0.2)
        return left


def _title(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        if process.status() != psutil.STATUS_ZOMBIE:
            return " ".join(process.cmdline()).strip()
    return ""
