"""VAS and attention masses of the answers that a benchmark run stored: they are read again, nothing is generated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import torch

from verl_avar.calls.store import call_key
from verl_avar.evaluation.benchmark.predict import RESULTS_FILE, read_questions
from verl_avar.evaluation.benchmark.schema import PLAIN
from verl_avar.evaluation.checkpoint import conversation, load_checkpoint
from verl_avar.evaluation.partial import fingerprint, write_text
from verl_avar.evaluation.rows import Row
from verl_avar.evaluation.vas_run import Outcome, Progress, Settings, measure_rows
from verl_avar.evaluation.vas_summary import summarise

ATTENTION = "attention"


def look(
    folder: Path,
    model: str | Path,
    *,
    batch_size: int = 16,
    device: str = "cpu",
    dtype: Any = torch.float32,
    progress: Progress = lambda batches: batches,
) -> dict:
    """Where a model looks in its plain answers in FOLDER, its folder of a run (benchmark/run.py).

    dtype: a torch dtype, or "auto" for the checkpoint's own. Returns {"vas": {"user" | "response": {"paper",
    "head_mean", "median"}}, "mass": {"visual", "system"} over response queries, "dtype", "measured": answers,
    "unmeasured": [{"row", "reason"}]}; scopes that no answer has are left out. Kept in FOLDER/attention/ by what
    decides it, batch by batch: a second call goes on, or returns what is there without loading the model.
    """
    rows = answered(folder)
    said = [[row.id, row.response, row.ended] for row in rows]
    place = folder / ATTENTION / call_key(str(model), fingerprint(model), str(dtype), said)[:16]
    if (place / "figures.json").exists():
        return json.loads((place / "figures.json").read_text(encoding="utf-8"))
    checkpoint = load_checkpoint(model, dtype=dtype, device=device)
    settings = Settings()
    outcome = measure_rows(checkpoint, rows, settings, place / "parts", batch_size=batch_size, progress=progress)
    found = figures(place / "parts", outcome, settings) | {"dtype": str(checkpoint.model.dtype).removeprefix("torch.")}
    write_text(place / "figures.json", json.dumps(found, indent=1, ensure_ascii=False))
    return found


def answered(folder: Path) -> list[Row]:
    """The plain answers of a run as rows to measure: the messages and images as they were asked, the first repeat."""
    columns = ["benchmark", "id", "condition", "repeat", "prompt", "answer", "response", "finish"]
    chosen = [("condition", "=", PLAIN), ("repeat", "=", 0)]
    results = pq.read_table(folder / RESULTS_FILE, columns=columns, filters=chosen).to_pylist()
    images = {(one["benchmark"], one["id"]): one["images"] for one in read_questions(folder)}
    return [
        Row(
            id=one["id"],
            messages=conversation(json.loads(one["prompt"])),
            images=[image["bytes"] for image in images[one["benchmark"], one["id"]]],
            response=one["response"],
            answer=one["answer"],
            problem="no answer came" if one["response"] is None else None,
            ended=one["finish"] == "stop",
        )
        for one in results
    ]


def figures(parts: Path, outcome: Outcome, settings: Settings) -> dict:
    """The figures of `look` from the parts on disk."""
    tables = [pd.read_parquet(part) for part in sorted(parts.glob("*.parquet"))]
    unmeasured = outcome.failed + outcome.skipped
    if not tables:
        return {"vas": {}, "mass": {}, "measured": 0, "unmeasured": unmeasured}
    table = pd.concat(tables, ignore_index=True).sort_values("number", kind="stable")
    scopes = summarise(table, classes=False, sink_share=settings.sink_share)["scopes"]
    mass = scopes["response"]["mass"] if "response" in scopes else {}
    return {
        "vas": {
            name: {"paper": scope["vas"], "head_mean": scope["head_mean"], "median": scope["median"]}
            for name, scope in scopes.items()
        },
        "mass": {role: mass[role] for role in ("visual", "system") if role in mass},
        "measured": int(table["number"].nunique()),
        "unmeasured": unmeasured,
    }
