"""`avar vas`: VAS and attention masses of a checkpoint on image questions, streamed to disk, batch by batch.

OUT/run.json        what is being measured; a rerun with the same settings goes on where the last one stopped
OUT/parts/          a file for each finished batch: one row per sample and scope (see measure.py), pictures' data
OUT/vas.json        the summary (vas_summary.py), OUT/vas.parquet: per sample × scope × layer × head
OUT/index.html, OUT/figures/
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from verl_avar import families
from verl_avar.evaluation.answer import Answers, answer, given
from verl_avar.evaluation.checkpoint import Checkpoint
from verl_avar.evaluation.heatmap import Places, border, by_piece, heatmap, places, sentences, worded
from verl_avar.evaluation.images import open_images
from verl_avar.evaluation.isolation import isolated
from verl_avar.evaluation.measure import Measured, measure
from verl_avar.evaluation.partial import write_parquet
from verl_avar.evaluation.rows import Row
from verl_avar.report import HeatmapSample
from verl_avar.roles import Role

Progress = Callable[[Iterable], Iterable]  # the batches, as they are taken


@dataclass(frozen=True)
class Settings:
    """What decides the numbers (batch size and device do not)."""

    scope: str = "both"
    layers: list[int] | None = None
    max_new_tokens: int = 512
    sink_share: float = 0.05


@dataclass
class Outcome:
    """What a run could not measure, by row id and reason."""

    failed: list[dict] = field(default_factory=list)  # broken rows
    skipped: list[dict] = field(default_factory=list)  # rows without an image

    def count(self, row: Row, reason: str) -> None:
        (self.skipped if reason == "no image" else self.failed).append({"row": row.id, "reason": reason})


def measure_rows(
    checkpoint: Checkpoint,
    rows: Sequence[Row],
    settings: Settings,
    folder: Path,
    *,
    batch_size: int = 1,
    pictures: int = 0,
    strict: bool = False,
    progress: Progress = lambda batches: batches,
) -> Outcome:
    """Measures the rows that `folder` (OUT/parts) does not hold yet, a file for each batch.

    pictures: of so many rows, evenly spread, the response is followed over the image. A row that can't be measured is
    counted in the outcome; with `strict` it raises ValueError.
    """
    outcome = Outcome()
    done = measured(folder)
    numbers = range(len(rows))
    followed = set(np.linspace(0, len(rows) - 1, min(pictures, len(rows))).round().astype(int).tolist())
    todo = []
    for number in numbers:
        row = rows[number]
        problem = row.problem or ("no image" if not row.images else None)
        if problem:
            outcome.count(row, problem)
            if strict and problem != "no image":
                raise ValueError(f"row {row.id}: {problem}")
        elif number not in done:
            todo.append(number)
    batch_size = 1 if families.alone(checkpoint.model) else batch_size
    batches = [todo[i : i + batch_size] for i in range(0, len(todo), batch_size)]
    for batch in progress(batches):
        started = time.monotonic()
        records = []

        def work(numbers: Sequence[int]) -> list[list[dict] | str]:
            follow = [number in followed for number in numbers]
            return list(_batch(checkpoint, [rows[number] for number in numbers], settings, follow))

        for number, result in isolated(batch, work):
            if isinstance(result, str):
                outcome.count(rows[number], result)
                if strict:
                    raise ValueError(f"row {rows[number].id}: {result}")
            else:
                records += [{"number": number} | record for record in result]
        for record in records:
            record["seconds"] = (time.monotonic() - started) / len(batch)
        if records:  # named by a number that no other part holds: a row that failed before may come again
            write_parquet(folder / f"{records[0]['number']:08d}.parquet", pd.DataFrame(records))
    return outcome


def measured(folder: Path) -> set[int]:
    """Numbers of the rows that the parts in `folder` hold."""
    return {
        int(n) for part in sorted(folder.glob("*.parquet")) for n in pd.read_parquet(part, columns=["number"])["number"]
    }


def _batch(
    checkpoint: Checkpoint, rows: list[Row], settings: Settings, follow: list[bool]
) -> Iterator[list[dict] | str]:
    images = [open_images(row.images) for row in rows]
    prompts = [row.messages for row in rows]
    if settings.scope == "user":
        answers = given(checkpoint, prompts, images, [""] * len(rows))
    elif all(row.response is not None for row in rows):
        answers = given(checkpoint, prompts, images, [row.response for row in rows], [row.ended for row in rows])
    elif all(row.response is None for row in rows):
        answers = answer(checkpoint, prompts, images, settings.max_new_tokens)
    else:
        raise ValueError("rows with and without responses in one batch")  # taken one by one then
    located = [places(checkpoint, answers, b, images) for b in range(len(rows))]
    written = (answers.roles == Role.RESPONSE).any(-1).tolist()
    follow_rows = [b for b, wanted in enumerate(follow) if wanted and written[b] and located[b].known]
    results = measure(
        checkpoint,
        answers,
        settings.scope,
        settings.layers,
        settings.sink_share,
        [border(place) for place in located],
        follow_rows,
    )
    for b, (row, result) in enumerate(zip(rows, results, strict=True)):
        if result.problem:
            yield result.problem
        else:
            yield _records(checkpoint, answers, b, row, result, located[b])


def _records(checkpoint: Checkpoint, answers: Answers, b: int, row: Row, result: Measured, place: Places) -> list[dict]:
    roles = answers.roles[b]
    sample = {
        "id": row.id,
        "question": row.question,
        "answer": row.answer,
        "text": answers.texts[b],
        "prompt_tokens": int(answers.inputs["attention_mask"][b].sum() - (roles == Role.RESPONSE).sum()),
        "response_tokens": int((roles == Role.RESPONSE).sum()),
        "visual_tokens": int((roles == Role.VISUAL).sum()),
        "layers": result.layers,
        "heads": len(result.scopes[0]["visual"]) // len(result.layers),
    }
    records = [sample | record for record in result.scopes]
    if result.steps is not None:
        written = answers.inputs["input_ids"][b][roles == Role.RESPONSE].tolist()
        pieces = sentences([checkpoint.tokenizer.decode([i]) for i in written])
        records[-1] |= {
            "pieces": worded(checkpoint.tokenizer, written, pieces),
            "steps": by_piece(result.steps, pieces).tolist(),
            "boxes": place.boxes.tolist(),
            "box_image": place.image.tolist(),
        }
    return records


def overlays(table: pd.DataFrame, rows: Sequence[Row]) -> list[HeatmapSample]:
    """Pictures of the followed samples. table: the rows of all parts."""
    samples = []
    if "steps" not in table:
        return samples
    for record in table[table["steps"].notna()].to_dict("records"):
        row = rows[record["number"]]
        place = Places(np.array([list(b) for b in record["boxes"]]), np.array(record["box_image"]))
        attention = np.array([list(step) for step in record["steps"]])
        samples.append(
            heatmap(
                open_images(row.images), row.question, list(record["pieces"]), attention, place, truth=row.answer or ""
            )
        )
    return samples


def check_model(checkpoint: Checkpoint, layers: Sequence[int] | None = None) -> None:
    """Asks the model for the masses of a short text. Raises RuntimeError where it reports none, ValueError for layers
    that can't be measured.
    """
    from verl_avar.attention.hf import probe

    ids = checkpoint.tokenizer("a", return_tensors="pt", add_special_tokens=True)["input_ids"].to(
        checkpoint.model.device
    )
    roles = torch.full_like(ids, int(Role.USER), dtype=torch.uint8)
    with torch.no_grad(), probe(roles, of=(Role.USER,)) as record:
        checkpoint.model(input_ids=ids, attention_mask=torch.ones_like(ids))
    record.mass(Role.USER)
    crossed = families.cross_attention_layers(checkpoint.model)
    known = sorted(crossed or record.layers)
    if unknown := sorted(set(layers or ()) - set(known)):
        kind = "cross-attention" if crossed else "attention"
        listed = ", ".join(map(str, known))
        raise ValueError(f"--layers {unknown[0]}: the {kind} layers of {type(checkpoint.model).__name__} are {listed}")
