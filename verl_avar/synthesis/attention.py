"""Attention-aware selection as a step of a run: OUT/outcomes.parquet and OUT/rows.parquet in, outcomes rewritten.

Rows are streamed: in memory stay a few numbers for each accepted row, never texts or images of more than some batches.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_avar.errors import ConfigError
from verl_avar.synthesis.outcomes import ACCEPTED, REJECTED
from verl_avar.synthesis.student import Attention, Chain, folder, score

if TYPE_CHECKING:
    import pyarrow as pa
    from omegaconf import DictConfig

    from verl_avar.synthesis.selection import Selection

STAGE, REASON = "attention", "attention_low"
BATCH = 64  # rows read at a time
NAMED = 20  # unmeasured rows that the report names
FIGURE = "attention.png"


def apply(
    config: DictConfig,
    out: Path | str,
    outcomes: Path | str | None = None,
    progress: Callable[[int], Any] = lambda done: None,
) -> dict:
    """Measures the accepted rows, selects and weights them, and rewrites the outcomes in one step.

    Filled in are `attention`, `weight` and, for rows that are dropped, status, stage, reason and detail. Rows that an
    earlier selection dropped are selected anew. Returns the block "attention" of summary.json (`selection.report`) and
    draws OUT/figures/attention.png; {} where the config names no student. progress: told how many chains were dealt
    with. Raises ConfigError for a student that can't be used, and where not one chain could be measured.
    """
    import numpy as np

    from verl_avar.synthesis.selection import report, select

    settings = config.attention
    if settings.model is None:
        return {}
    out = Path(out)
    outcomes = Path(outcomes or out / "outcomes.parquet")
    faced: list[tuple] = []  # of each accepted row: its place in the outcomes, key, id, source, task, words, anchors
    known = score(
        settings.model,
        _chains(config, out, outcomes, faced),
        out,
        batch_size=settings.batch_size,
        device=settings.device,
        progress=progress,
    )
    rows = _frame(faced, known)
    if len(rows) and rows["attention"].isna().all():
        problem = known.problems[rows["key"].iloc[0]]
        raise ConfigError(
            f"attention.model {settings.model}: none of {len(rows)} chains could be measured; the first: {problem}"
        )
    names = list(zip(rows["id"], rows["place"], strict=True))
    chosen = select(names, rows["attention"].to_numpy(float), settings.keep, settings.weight)
    rows = rows.assign(kept=chosen.kept, weight=chosen.weights)
    _rewrite(outcomes, rows, chosen, settings.keep)
    found = report(rows, settings.keep, settings.weight, seed=config.seed)
    unmeasured = rows[rows["attention"].isna()].head(NAMED)
    found |= {
        "model": str(settings.model),
        "measurements": str(folder(out, settings.model, settings.device).relative_to(out)),
        "problems": [
            {"id": row_id, "reason": known.problems[key]}
            for row_id, key in zip(unmeasured["id"], unmeasured["key"], strict=True)
        ],
    }
    if np.isfinite(rows["attention"].to_numpy(float)).any():
        from verl_avar.synthesis.attention_figure import figure

        (out / "figures").mkdir(exist_ok=True)
        figure(rows, found).savefig(out / "figures" / FIGURE)
    return found


def _chains(config: DictConfig, out: Path, outcomes: Path, faced: list[tuple]) -> Iterator[Chain]:
    """The chains of accepted rows; what selection and report need of each goes to `faced`."""
    rows = _records(out / "rows.parquet", ["source", "source_row", "question", "images", "meta"])
    columns = ["id", "source", "source_row", "status", "stage", "anchored", "anchors"]
    for place, outcome in enumerate(_records(outcomes, columns)):
        if not _takes_part(outcome["status"], outcome["stage"]):
            continue
        where = outcome["source"], outcome["source_row"]
        row = next((row for row in rows if (row["source"], row["source_row"]) == where), None)
        if row is None:
            raise ValueError(
                f"{out}: row {where[1]} of {where[0]} is not in rows.parquet in the order of outcomes.parquet"
            )
        images = [image["bytes"] for image in row["images"]]
        text = outcome["anchored"]
        chain = Chain(config.system, row["question"], images, text)
        task = json.loads(row["meta"] or "{}").get("task")
        words, anchors = len(text.split()), len(outcome["anchors"] or [])
        faced.append((place, chain.key, outcome["id"], where[0], task, words, anchors))
        yield chain


def _takes_part(status: str, stage: str | None) -> bool:
    """Rows that passed every check, those that attention dropped before included."""
    return status == ACCEPTED or (status == REJECTED and stage == STAGE)


def _records(path: Path, columns: list[str]) -> Iterator[dict]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, pre_buffer=False) as file:
        for batch in file.iter_batches(BATCH, columns=columns):
            yield from batch.to_pylist()


def _frame(faced: list[tuple], known: Attention):
    import pandas as pd

    rows = pd.DataFrame(faced, columns=["place", "key", "id", "source", "task", "words", "anchors"])
    return rows.assign(attention=[known.shares.get(key, float("nan")) for key in rows["key"]])


def _rewrite(path: Path, rows, chosen: Selection, keep: float) -> None:
    """The outcomes with what was decided about `rows`; the old file stays until the new one is whole."""
    import pyarrow.parquet as pq

    decided = {
        int(place): (None if attention != attention else attention, bool(kept), float(weight))
        for place, attention, kept, weight in zip(
            rows["place"], rows["attention"], rows["kept"], rows["weight"], strict=True
        )
    }
    unfinished = path.with_name(path.name + ".tmp")
    with pq.ParquetFile(path, pre_buffer=False) as file, pq.ParquetWriter(unfinished, file.schema_arrow) as writer:
        place = 0
        for batch in file.iter_batches(BATCH * 16):
            writer.write_batch(_decided(batch, place, decided, chosen.threshold, keep))
            place += batch.num_rows
    os.replace(unfinished, path)


def _decided(batch: pa.RecordBatch, first: int, decided: dict, threshold: float | None, keep: float) -> pa.RecordBatch:
    import pyarrow as pa

    names = ("status", "stage", "reason", "detail", "attention", "weight")
    values = {name: batch[name].to_pylist() for name in names}
    for row in range(batch.num_rows):
        if first + row not in decided:
            continue
        attention, kept, weight = decided[first + row]
        if kept:
            news = (ACCEPTED, None, None, None, attention, weight)
        else:
            detail = f"attention {attention:.4f}; the {keep:.0%} with the most begin at {threshold:.4f}"
            news = (REJECTED, STAGE, REASON, detail, attention, weight)
        for name, new in zip(names, news, strict=True):
            values[name][row] = new
    for name in names:
        index = batch.schema.get_field_index(name)
        batch = batch.set_column(
            index, batch.schema.field(index), pa.array(values[name], batch.schema.field(index).type)
        )
    return batch
