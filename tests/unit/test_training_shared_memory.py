"""Segments left in shared memory: ours and unmapped go, mapped and older ones stay."""

import mmap
import os
import time

from verl_avar.training import shared_memory


def test_only_new_unmapped_segments_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path)
    for name in ("psm_left", "verl_weights_left", "psm_used", "psm_old", "other"):
        (tmp_path / name).write_bytes(b"x" * 4096)
    os.utime(tmp_path / "psm_old", (0, 0))
    with (tmp_path / "psm_used").open("r+b") as file, mmap.mmap(file.fileno(), 0):
        shared_memory.remove_segments(since=time.time() - 60)
        assert sorted(f.name for f in tmp_path.iterdir()) == ["other", "psm_old", "psm_used"]
