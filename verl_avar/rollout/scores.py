"""Scores per KV-cache slot, in memory that the worker writes and the scheduler reads.

A slot's floats are the scores (`reward.SCORES`) of the query token whose key and value sit in that slot.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from verl_avar.reward import SCORES

COLUMNS = len(SCORES)
_PREFIX, _NEW_PREFIX = "avar-scores-", "avar-new-"
_NEW_S = 60.0  # a file that has no engine's name after this long was left by a writer that was killed
_ITEM = np.dtype(np.float32)


def shared_folder() -> Path:
    """Where score files live: the shared-memory folder where there is one."""
    return Path("/dev/shm") if os.path.isdir("/dev/shm") else Path(tempfile.gettempdir())


def _path(engine_id: str) -> Path:
    return shared_folder() / (_PREFIX + re.sub(r"[^\w.-]", "_", engine_id))


class SharedScores:
    """float32 [rows, 5] mapped from a file that has a name only until the reader has opened it.

    The writer (worker) creates it, the reader (scheduler) opens and unlinks it, so that nothing is left behind even
    when both are killed later. `engine_id` is vLLM's, unique to an engine. The writer holds a lock on its file for
    life: an unlocked one was left by an engine killed while starting, and the next writer removes it.
    """

    def __init__(self, fd: int, path: Path):
        self._fd = fd
        self.path = path
        self._map = mmap.mmap(fd, os.fstat(fd).st_size)
        self.array = np.frombuffer(self._map, dtype=_ITEM).reshape(-1, COLUMNS)

    @classmethod
    def create(cls, engine_id: str, slots: int) -> SharedScores:
        """Raises OSError with the size that is missing where the shared-memory folder is too small."""
        _remove_abandoned()
        path = _path(engine_id)
        size = slots * COLUMNS * _ITEM.itemsize
        fd, unnamed = tempfile.mkstemp(dir=path.parent, prefix=_NEW_PREFIX)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(fd, 0, size)  # a sparse file would end in SIGBUS when the folder fills up
            os.rename(unnamed, path)
        except OSError as error:
            os.close(fd)
            os.unlink(unnamed)
            raise OSError(
                error.errno,
                f"attention scores need {size / 2**20:.0f} MiB in {path.parent} ({error.strerror}): make room, enlarge "
                "it (docker: --shm-size), or give the KV cache less memory",
            ) from error
        return cls(fd, path)

    @classmethod
    def open(cls, engine_id: str) -> SharedScores:
        """Opens the worker's file and removes its name."""
        path = _path(engine_id)
        try:
            fd = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            raise RuntimeError(
                f"the worker's attention scores are not at {path}: scheduler and worker must run on one machine and "
                "share its shared-memory folder"
            ) from None
        path.unlink()
        return cls(fd, path)

    def close(self) -> None:
        """Removes the name if the reader never came. The memory goes with the process: views of it may be alive."""
        self.path.unlink(missing_ok=True)


def _remove_abandoned() -> None:
    for path in shared_folder().glob(_NEW_PREFIX + "*"):
        with suppress(FileNotFoundError, PermissionError):
            if time.time() - path.stat().st_mtime > _NEW_S:
                path.unlink()
    for path in shared_folder().glob(_PREFIX + "*"):
        try:
            fd = os.open(path, os.O_RDWR)
        except (FileNotFoundError, PermissionError):  # gone meanwhile, or another user's
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:  # its engine is starting right now
            pass
        finally:
            os.close(fd)
