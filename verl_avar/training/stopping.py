"""SIGTERM, as schedulers send it before they kill: the run ends its step, saves a checkpoint and leaves.

A second SIGTERM ends it at once; not within AGAIN_S of the first, since one cause can send several: the kernel tells a
child of its parent's death again whenever it gets another parent, as when a parent of many threads is killed. RL's
trainer runs in another process than the one that gets the signal, perhaps on another node; it looks for a file in the
folder of the checkpoints.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

EXIT_STOPPED = 128 + signal.SIGTERM  # as of a process that SIGTERM ended
AGAIN_S = 2.0
REQUEST = "stop"  # in trainer.default_local_dir


class Stopped(Exception):
    """The run ended because it was asked to; its words say which checkpoint it left."""

    @classmethod
    def after(cls, step: int) -> Stopped:
        left = f"a checkpoint of step {step} is saved" if step else "no step was finished"
        return cls(f"{left}; run the same command again to go on")


def on_sigterm(ask: Callable[[], object]) -> None:
    """From now on the first SIGTERM calls `ask`, and the second ends this process. For the main thread.

    To be called after `ray.init`, which sets a handler of its own.
    """

    asked = None

    def stop(*_) -> None:
        nonlocal asked
        if asked is not None:
            if time.monotonic() - asked > AGAIN_S:
                sys.exit(EXIT_STOPPED)
            return
        asked = time.monotonic()
        ask()
        with suppress(RuntimeError):  # the signal came while something was being written there
            print("SIGTERM: saving a checkpoint after this step; once more to end at once", file=sys.stderr, flush=True)

    signal.signal(signal.SIGTERM, stop)


def request(folder: str) -> Path:
    """The file that asks the run whose `trainer.default_local_dir` this is to stop."""
    return Path(folder) / REQUEST
