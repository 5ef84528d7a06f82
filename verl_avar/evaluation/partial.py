"""Results on disk while a long measurement runs: what it is about, and files that are whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pandas as pd


def begin(out: Path, settings: dict[str, Any]) -> None:
    """Starts a measurement in `out`, or goes on with the one that is there.

    settings: what decides the numbers, JSON types. Raises ValueError where `out` holds results of other settings, with
    what differs.
    """
    file = Path(out) / "run.json"
    settings = json.loads(json.dumps(settings))
    if file.exists():
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}: {error}; remove it to start afresh") from None
        differ = [k for k in sorted(before.keys() | settings.keys()) if before.get(k) != settings.get(k)]
        if differ:
            was = "; ".join(f"{k}: {before.get(k)} there, {settings.get(k)} asked for" for k in differ)
            raise ValueError(f"{out} holds results of another measurement ({was}); choose another --out")
        return
    if Path(out).exists() and any(Path(out).iterdir()):
        raise ValueError(f"{out} is not empty and holds no run.json of a measurement; choose another --out")
    write_text(file, json.dumps(settings, indent=1, ensure_ascii=False))


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
    facts = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(path.iterdir()) if p.is_file()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
