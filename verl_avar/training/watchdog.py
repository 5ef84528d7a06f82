"""Ends a run that no longer makes progress.

A trainer can wait, inside `ray.get`, for an answer that never comes; so a thread watches, and ends the process with
everything it started.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from verl_avar.training.processes import descendants, end_processes
from verl_avar.training.shared_memory import remove_segments

STALLED = 3  # exit status


@contextmanager
def watch(
    places: Sequence[Path | str],
    stall_s: float,
    checks: Sequence[Callable[[], str | None]] = (),
    every_s: float = 5.0,
    end: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Calls `end(message)`, by default `end_process`, when nothing in `places` was written for `stall_s` seconds, or
    one of the checks returned what is wrong.

    places: files, and folders with all that is in them. checks: called every `every_s` seconds.
    """
    started, done = time.time(), threading.Event()

    def stalled() -> str | None:
        if time.time() - max(started, last_write(places)) <= stall_s:
            return None
        return f"no step and no checkpoint for {stall_s:.0f} s (avar.stall_s); what it waited for is in the lines above"

    def look() -> None:
        while not done.wait(every_s):
            for check in (*checks, stalled):
                if message := check():
                    (end or end_process)(f"{message}. The same command resumes from the newest checkpoint")
                    return

    thread = threading.Thread(target=look, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def last_write(places: Sequence[Path | str]) -> float:
    """When the newest of these files, or of the files in these folders, was written; 0 where there is none."""
    newest = 0.0
    for place in map(Path, places):
        for path in (place, *place.rglob("*")):
            with suppress(FileNotFoundError):  # an old checkpoint may go while we look
                newest = max(newest, path.stat().st_mtime)
    return newest


def end_process(message: str) -> None:
    """Ends this process and all that it started (Ray, its workers, vLLM), with one line and status `STALLED`."""
    this = psutil.Process()
    end_processes(descendants(this))
    remove_segments(since=this.create_time())
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(STALLED)  # the main thread can't be interrupted
