"""Per-step metrics on disk: verl's `file` logger, kept over resumed runs.

verl's logger opens its file anew (verl/utils/tracking.py:541), so an earlier attempt's file is moved aside first; a
step that was run twice counts as the later attempt saw it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path


def log_to(file: Path | str) -> None:
    """Points verl's `file` logger at `file`, in this process and its children; moves an earlier file aside."""
    file = Path(file).resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        file.rename(file.with_suffix(f".{len(_earlier(file))}.jsonl"))
    os.environ["VERL_FILE_LOGGER_PATH"] = str(file)


def log_to_unless_told(file: Path | str) -> None:
    """`log_to`, in the process that logs, unless whoever started it has set the logger's VERL_FILE_LOGGER_PATH."""
    if "VERL_FILE_LOGGER_PATH" not in os.environ and os.environ.get("RANK", "0") == "0":
        log_to(file)


def read_steps(file: Path | str) -> list[dict[str, float]]:
    """All steps of a run, ascending, each with its `step`: of `file` and of the attempts before it."""
    file = Path(file)
    steps: dict[int, dict] = {}
    for part in [*_earlier(file), file]:
        for line in part.read_text().splitlines() if part.exists() else []:
            if line.endswith("}"):  # a killed run may leave half a line
                entry = json.loads(line)
                steps[entry["step"]] = {"step": entry["step"], **entry["data"]}
    return [steps[step] for step in sorted(steps)]


def _earlier(file: Path) -> list[Path]:
    numbered = [path for path in file.parent.glob(f"{file.stem}.*.jsonl") if path.suffixes[-2][1:].isdigit()]
    return sorted(numbered, key=lambda path: int(path.suffixes[-2][1:]))
