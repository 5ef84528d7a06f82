"""Ends a run that no longer makes progress, and one that is told to stop, without leaving processes behind.

In verl a failed weight load leaves the trainer waiting for an answer that never comes (verl/checkpoint_engine).
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class StalledError(RuntimeError):
    """No progress for longer than allowed."""


@contextmanager
def watch(folder: Path | str, stall_s: float, every_s: float = 5.0) -> Iterator[None]:
    """Raises StalledError in the main thread when nothing in `folder` was written for `stall_s` seconds; turns SIGTERM
    into SystemExit, so that `finally` blocks run. Main thread only: it uses SIGALRM.
    """
    folder, started = Path(folder), time.time()

    def check(signum, frame):
        newest = max([started, *(p.stat().st_mtime for p in folder.rglob("*") if p.is_file())])
        if time.time() - newest > stall_s:
            raise StalledError(
                f"no step and no checkpoint for {stall_s:.0f} s; the last lines above say what it waited for. "
                "Run the same command again to resume from the newest checkpoint, or raise avar.stall_s"
            )

    def stop(signum, frame):
        raise SystemExit(128 + signum)

    handlers = {number: signal.signal(number, act) for number, act in ((signal.SIGALRM, check), (signal.SIGTERM, stop))}
    timer = signal.setitimer(signal.ITIMER_REAL, every_s, every_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        for number, handler in handlers.items():
            signal.signal(number, handler)
