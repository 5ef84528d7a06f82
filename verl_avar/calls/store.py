"""The answered calls of a run folder: JSON lines in append-only shards, found by a content hash.

OUT/calls/WRITER-00000.jsonl     a line a call; every process writes shards of its own, so that two never mix
OUT/failures/WRITER-00000.jsonl  the same for calls that no attempt got an answer to

Each line is written by one system call, so that a killed process leaves whole lines and at most one torn at the end of
its own shard. Readers pass over what is no whole line. Where two lines have one key the first counts.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from verl_avar.errors import ConfigError

CALLS, FAILURES = "calls", "failures"
SHARD_BYTES = 64 * 2**20
OPEN = 64  # shards that a reader keeps open: there may be more of them than a process may open files
HEAD = re.compile(rb'\{"key": "([0-9a-f]{16})([0-9a-f]{16})"')
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_INDEX = np.dtype([("high", "<u8"), ("low", "<u8"), ("shard", "<u4"), ("offset", "<u8")])  # 28 bytes a call


def call_key(*parts: Any) -> str:
    """32 hexadecimal digits of SHA-256 over JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


class Lines:
    """The lines that were there when it was opened: an index of 28 bytes each in memory, the lines on disk."""

    def __init__(self, folder: Path):
        self.shards = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
        entries = [
            (high, low, number, offset)
            for number, path in enumerate(self.shards)
            for high, low, offset in _whole_lines(path)
        ]
        self.index = np.array(entries, dtype=_INDEX)
        self.index.sort(order=["high", "low", "shard", "offset"])
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.index)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    def get(self, key: str) -> dict | None:
        """The call of a key, or None."""
        high, low = np.uint64(int(key[:16], 16)), np.uint64(int(key[16:], 16))
        at = int(np.searchsorted(self.index["high"], high))
        while at < len(self.index) and self.index["high"][at] == high:
            if self.index["low"][at] == low:
                return self._read(int(self.index["shard"][at]), int(self.index["offset"][at]))
            at += 1
        return None

    def __iter__(self) -> Iterator[dict]:
        """Every call once, shard by shard."""
        again = np.zeros(len(self.index), dtype=bool)  # lines of a key after its first
        if len(self.index) > 1:
            again[1:] = (self.index["high"][1:] == self.index["high"][:-1]) & (
                self.index["low"][1:] == self.index["low"][:-1]
            )
        for entry in np.sort(self.index[~again], order=["shard", "offset"]):
            yield self._read(int(entry["shard"]), int(entry["offset"]))

    def _read(self, shard: int, offset: int) -> dict:
        if shard not in self._open:
            if len(self._open) == OPEN:
                self._open.pop(next(iter(self._open))).close()
            self._open[shard] = self.shards[shard].open("rb")
        file = self._open[shard]
        file.seek(offset)
        return json.loads(file.readline())


def _whole_lines(path: Path) -> Iterator[tuple[int, int, int]]:
    """(both halves of the key, offset) of each."""
    offset = 0
    with path.open("rb") as file:
        for line in file:
            if (head := HEAD.match(line)) and _is_json(line):
                yield int(head[1], 16), int(head[2], 16), offset
            offset += len(line)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:  # torn, or damaged by the disk
        return False
    return line.endswith(b"\n")


class Writer:
    """Appends lines to shards of its own."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name, self.number, self.file, self.path, self.size = folder, name, 0, None, folder, 0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, key: str, record: dict) -> None:
        """Writes a line; it is in the file when this returns. Raises OSError, as on a full disk."""
        line = (json.dumps({"key": key} | record, ensure_ascii=False) + "\n").encode()
        if self.file is None or self.size + len(line) > SHARD_BYTES:
            self.close()
            self.path = self.folder / f"{self.name}-{self.number:05d}.jsonl"
            self.file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
            self.number, self.size = self.number + 1, 0
        try:
            written = os.write(self.file, line)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        if written != len(line):
            os.ftruncate(self.file, self.size)  # else the next line would begin in the middle of this one
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self.size += written

    def close(self) -> None:
        if self.file is not None:
            os.fsync(self.file)
            os.close(self.file)
            self.file = None


def write_whole(path: Path, text: str) -> None:
    """A small file that is there as a whole, or as it was before."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Removes what writers that were killed have left: files and folders `.NAME.PID`."""
    for path in folder.glob(".*.*"):
        if path.suffix[1:].isdigit():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def writer_name() -> str:
    """A name for shards that no other process has had or will have; names sort by the time they were made."""
    return f"{time.time_ns():020d}-{socket.gethostname()}-{os.getpid()}"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps a run folder to one run: a second one would pay for the same calls. Raises ConfigError where one is there.

    The lock ends with its process. Where a file system has no locks, shards of their own still keep runs apart.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise ConfigError(f"{out}: a run is writing here ({owner}); wait for it, or name another `out`") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
