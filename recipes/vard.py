"""The miniature's cold-start data, through the same pipeline as anybody's (`avar synth run`), by its exact teacher."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console
from trainers import ROOT

from verl_avar.synthesis.config import load
from verl_avar.synthesis.run import synthesise


def write_vard(path: Path, rows: int, seed: int, console: Console) -> dict[str, int]:
    """Writes the accepted ones of `rows` questions as verl's SFT rows; returns counts by status.

    Everything else that the run leaves, a page to look at among it, stays in a folder `vard` beside `path`.
    """
    from verl_avar.miniature.data import write_questions
    from verl_avar.miniature.teacher_server import Teacher

    out = path.parent / "vard"
    questions = write_questions(out / "questions.parquet", rows, seed)
    with Teacher() as teacher:
        config = load(
            ROOT / "recipes" / "synthesis" / "miniature.yaml",
            [f"out={out}", f"seed={seed}", f"endpoints.teacher.base_url={teacher.url}"],
        )
        config.sources[0].path = str(questions)
        result = synthesise(config, console)
    if result.error or result.summary["pending"]:
        raise RuntimeError(f"cold-start data: {result.error or result.stop}; the same command goes on from here")
    shutil.copyfile(out / "sft.parquet", path)
    counts = {"rows": pq.read_metadata(path).num_rows, "left out": result.summary["rejected"]}
    return {name: count for name, count in counts.items() if count}
