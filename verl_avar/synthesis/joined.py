"""A run's folder read back: what became of each row beside the row itself, a batch in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from verl_avar.errors import ConfigError
from verl_avar.synthesis.outcomes import ACCEPTED

ROWS, OUTCOMES, SUMMARY = "rows.parquet", "outcomes.parquet", "summary.json"
BATCH = 32  # rows with their images in memory at a time


def summary_of(out: Path) -> dict:
    """summary.json of a run's folder. Raises ConfigError where there is none."""
    path = Path(out) / SUMMARY
    if not path.is_file():
        raise ConfigError(f"no file {path}; `avar synth run` writes it")
    return json.loads(path.read_text(encoding="utf-8"))


def outcomes(out: Path, columns: Sequence[str] | None = None) -> Iterator[dict]:
    """Rows of outcomes.parquet in their order; `columns`: only these."""
    return _read(Path(out) / OUTCOMES, columns)


def joined(out: Path) -> Iterator[tuple[dict, dict | None]]:
    """(outcome, row) of every source row; the row is None where intake rejected it.

    Both files have the order of the sources, so that one pass over each is enough. Raises ConfigError where a row of
    rows.parquet has no outcome.
    """
    rows = _read(Path(out) / ROWS)
    row = next(rows, None)
    for outcome in outcomes(out):
        if row is not None and key(row) == key(outcome):
            yield outcome, row
            row = next(rows, None)
        else:
            yield outcome, None
    if row is not None:
        raise ConfigError(
            f"{Path(out) / OUTCOMES}: nothing about row {row['source_row']} of {row['source']}, or not in the order of "
            f"{ROWS}; run `avar synth run` again"
        )


def accepted(out: Path) -> Iterator[tuple[dict, dict]]:
    """(outcome, row) of the accepted rows. Raises ConfigError for one without its row."""
    for outcome, row in joined(out):
        if outcome["status"] == ACCEPTED:
            if row is None:
                raise ConfigError(
                    f"{Path(out) / ROWS}: row {outcome['source_row']} of {outcome['source']} was accepted but is not "
                    f"there, or not in the order of {OUTCOMES}"
                )
            yield outcome, row


def key(row: dict) -> tuple[str, int]:
    """What names a source row in both files."""
    return row["source"], row["source_row"]


def _read(path: Path, columns: Sequence[str] | None = None) -> Iterator[dict]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # With pre_buffer, pyarrow's default, the whole file is in memory at the end.
        with pq.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=BATCH, columns=columns):
                yield from batch.to_pylist()
    except FileNotFoundError:
        raise ConfigError(f"no file {path}; `avar synth run` writes it") from None
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{path} is not a parquet file: {error}") from None
