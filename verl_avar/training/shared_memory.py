"""Segments that verl leaves in shared memory.

A weight sync without CUDA IPC goes through multiprocessing's shared memory (in /dev/shm), which the processes that verl
ends by force, and syncs that fail, never unlink.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
NAMES = ("psm_*", "verl_weights_*")


def remove_segments(since: float) -> None:
    """Removes this user's segments made after a time (seconds since the epoch) that no process maps. Linux only."""
    mine = []
    for segment in [path for name in NAMES for path in SHARED_MEMORY.glob(name)]:
        with suppress(FileNotFoundError):  # its owner may unlink it meanwhile
            facts = segment.stat()
            if facts.st_uid == os.getuid() and facts.st_mtime >= since:
                mine.append(segment)
    mapped = _mapped() if mine else ""
    for segment in mine:
        if segment.name not in mapped:
            segment.unlink(missing_ok=True)


def _mapped() -> str:
    """What this user's processes map."""
    texts = []
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            texts.append(maps.read_text())
        except OSError:  # it ended meanwhile, or is another user's
            continue
    return "".join(texts)
