"""Scores per KV-cache slot, in memory that the worker writes and the scheduler reads.

A slot's floats are the scores (`reward.SCORES`) of the query token whose key and value sit in that slot.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import re
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from verl_avar.reward import SCORES

logger = logging.getLogger(__name__)

COLUMNS = len(SCORES)
_PREFIX, _NEW_PREFIX = "avar-scores-", "avar-new-"
_NEW_S = 60.0  # a file that has no engine's name after this long was left by a writer that was killed
_WAIT_S = 300.0  # for another engine of the same engine_id to have started
_ITEM = np.dtype(np.float32)


def shared_folder() -> Path:
    """Where score files live: the shared-memory folder where there is one."""
    return Path("/dev/shm") if os.path.isdir("/dev/shm") else Path(tempfile.gettempdir())


def _path(engine_id: str) -> Path:
    return shared_folder() / (_PREFIX + re.sub(r"[^\w.-]", "_", engine_id))


class SharedScores:
    """float32 [rows, 5] mapped from a file that has a name only until the reader has opened it.

    The writer (worker) creates it, the reader (scheduler) opens and unlinks it, so that nothing is left behind even
    when both are killed later. The writer holds a lock on its file for life: an unlocked one was left by an engine
    killed while starting, and the next writer removes it. `engine_id` is vLLM's; a user may have given two engines the
    same one, so a name is never taken from a file that is locked.
    """

    def __init__(self, fd: int, path: Path):
        """Takes over `fd`. The mapping keeps a duplicate of it, and with it the lock, for as long as it lives."""
        self.path = path
        self._inode = _inode(os.fstat(fd))
        self._map = mmap.mmap(fd, os.fstat(fd).st_size)
        os.close(fd)
        self.array = np.frombuffer(self._map, dtype=_ITEM).reshape(-1, COLUMNS)

    @classmethod
    def create(cls, engine_id: str, slots: int) -> SharedScores:
        """A file of `slots` rows of zeros. Waits while another engine of the same engine_id is starting.

        Raises OSError where the shared-memory folder is too small (with the size that is missing) or can't be written,
        RuntimeError where the other engine takes longer than _WAIT_S.
        """
        _remove_abandoned()
        path = _path(engine_id)
        fd, unnamed = _reserve(path.parent, slots * COLUMNS * _ITEM.itemsize)
        try:
            _take_name(unnamed, path, engine_id)
        except BaseException:
            os.close(fd)
            raise
        finally:
            unnamed.unlink(missing_ok=True)
        return cls(fd, path)

    @classmethod
    def open(cls, engine_id: str) -> SharedScores:
        """Opens the worker's file and removes its name."""
        path = _path(engine_id)
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise RuntimeError(
                f"the worker's attention scores are not at {path}: scheduler and worker must run on one machine and "
                "share its shared-memory folder"
            ) from None
        path.unlink()
        return cls(fd, path)

    def close(self) -> None:
        """Removes the name if the reader never came. The memory goes with the process: views of it may be alive."""
        with suppress(FileNotFoundError):
            if _inode(self.path.stat()) == self._inode:  # by now the name may be that of another engine
                self.path.unlink()


def _inode(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _reserve(folder: Path, size: int) -> tuple[int, Path]:
    """A locked file of `size` bytes under a passing name."""
    try:
        fd, name = tempfile.mkstemp(dir=folder, prefix=_NEW_PREFIX)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(fd, 0, size)  # a sparse file would end in SIGBUS when the folder fills up
        except OSError:
            os.close(fd)
            os.unlink(name)
            raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM)
        fix = (
            "make room, enlarge it (docker: --shm-size), or give the KV cache less memory"
            if full
            else "let this user write there"
        )
        raise OSError(
            error.errno, f"attention scores need {size / 2**20:.0f} MiB in {folder} ({error.strerror}): {fix}"
        ) from error
    return fd, Path(name)


def _take_name(unnamed: Path, path: Path, engine_id: str) -> None:
    """Links a file to its engine's name once that is free."""
    end = time.monotonic() + _WAIT_S
    waits = False
    while True:
        with suppress(FileExistsError):
            os.link(unnamed, path)
            return
        if time.monotonic() > end:
            raise RuntimeError(
                f"{path} belongs to another engine, which has been starting for {_WAIT_S:.0f} s with the same "
                f"engine_id ({engine_id}): give each engine of this machine a kv_transfer_config.engine_id of its own, "
                "or none"
            )
        if not waits:
            logger.warning("verl_avar: waiting for another engine with engine_id %s to start", engine_id)
            waits = True
        time.sleep(0.1)
        os.utime(unnamed)  # in use, see _NEW_S
        _remove_abandoned()


def _remove_abandoned() -> None:
    for path in shared_folder().glob(_NEW_PREFIX + "*"):
        with suppress(FileNotFoundError, PermissionError):
            if time.time() - path.stat().st_mtime > _NEW_S:
                path.unlink()
    for path in shared_folder().glob(_PREFIX + "*"):
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # gone meanwhile, another user's, or no file of ours at all
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _inode(path.stat()) == _inode(os.fstat(fd)):
                path.unlink()
        except (BlockingIOError, FileNotFoundError, PermissionError):  # its engine is starting; gone; another user's
            pass
        finally:
            os.close(fd)
