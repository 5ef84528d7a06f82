"""Results on disk while a long measurement runs: what it is about, and files that are whole or not there."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd


@contextmanager
def begun(out: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Starts a measurement in `out`, or goes on with the one that is there; meanwhile no other run writes there.

    settings: what decides the numbers, JSON types. Raises ValueError where `out` holds results of other settings, with
    what differs, and where another run is at work in it.
    """
    path, settings = Path(out) / "run.json", json.loads(json.dumps(settings))
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() and any(path.parent.iterdir()):
        raise ValueError(f"{out} is not empty and holds no run.json of a measurement; choose another --out")
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is at work in {out}; wait for it, or choose another --out") from None
        if {entry.name for entry in path.parent.iterdir()} > {path.name}:
            file.seek(0)
            _same(out, path, file.read(), settings)
        else:  # there are no results yet
            file.truncate(0)
            file.write(json.dumps(settings, indent=1, ensure_ascii=False))
            file.flush()
        yield


def _same(out: Path, path: Path, text: str, settings: dict) -> None:
    """Raises ValueError where the results in `out` are of other settings than these."""
    try:
        before = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: {error}; remove it to start afresh") from None
    differ = [k for k in sorted(before.keys() | settings.keys()) if before.get(k) != settings.get(k)]
    if differ:
        was = "; ".join(f"{k}: {before.get(k)} there, {settings.get(k)} asked for" for k in differ)
        raise ValueError(f"{out} holds results of another measurement ({was}); choose another --out")


def write_text(path: Path, text: str) -> None:
    """Writes a file in one step; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def write_parquet(path: Path, table: pd.DataFrame) -> None:
    """Writes a table in one step; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    table.to_parquet(unfinished, index=False)
    os.replace(unfinished, path)


def fingerprint(path: str | Path) -> str:
    """What a path holds, in 16 characters: a file by its bytes, a folder by its files' names, sizes and times.

    Texts for readers don't count: a model card is written beside weights that were evaluated already.
    A name that is no path (a model on the hub) stands for itself.
    """
    path = Path(path)
    if not path.exists():
        return str(path)
    if path.is_file():
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        return digest.hexdigest()[:16]
    facts = [
        (p.name, p.stat().st_size, p.stat().st_mtime_ns)
        for p in sorted(path.iterdir())
        if p.is_file() and p.suffix != ".md"
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
