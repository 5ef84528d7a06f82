"""Ending processes by handle, never by name."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import psutil

GRACE_S = 20.0  # between SIGTERM and SIGKILL: Ray and vLLM need some seconds to leave


def end_processes(processes: Iterable[psutil.Process]) -> None:
    """SIGTERM, some seconds, SIGKILL: to these and no others; those that are gone already are passed over."""
    alive = [p for p in processes if _runs(p)]
    for stop in (psutil.Process.terminate, psutil.Process.kill):
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                stop(process)
        _, alive = psutil.wait_procs(alive, timeout=GRACE_S)


def descendants(process: psutil.Process) -> set[psutil.Process]:
    """Its children and theirs; none where it is gone."""
    try:
        return set(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
