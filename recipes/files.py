"""JSON files that are whole or not there."""

from __future__ import annotations

import json
from pathlib import Path


def write_json(path: Path, value) -> None:
    """Writes through a temporary file beside it: a run that is killed leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1))
    temporary.replace(path)


def read_json(path: Path, default=None):
    """What is in a file, or `default` where there is none."""
    return json.loads(path.read_text()) if path.exists() else default
