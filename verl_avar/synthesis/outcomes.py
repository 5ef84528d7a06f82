"""What became of every row: the file that outputs, the dataset card and the viewer are made from."""

from __future__ import annotations

import pyarrow as pa

ACCEPTED, REJECTED, PENDING = "accepted", "rejected", "pending"  # pending: a budget or an interruption came first
STAGES = ("describe", "reason", "anchor")
TEXTS = {"describe": "description", "reason": "chain", "anchor": "anchored"}  # columns of the stages' texts

# One row for each row of the sources, in their order: rows of rows.parquet and those that intake rejected.
OUTCOMES = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("source_row", pa.int64()),
        ("status", pa.string()),
        ("stage", pa.string()),  # where it was rejected: intake, describe, reason, anchor or attention; else null
        ("reason", pa.string()),  # reason code of a rejected row, such as wrong_answer
        ("detail", pa.string()),  # the same in words, one line
        # Texts of the stages as they were kept, or as the rejected one came; null where a stage was not reached.
        ("description", pa.string()),
        ("chain", pa.string()),
        ("anchored", pa.string()),
        # Explicit looks at the image in `anchored`: their words, and where in the chain they begin, 0 to 1.
        ("anchors", pa.list_(pa.struct([("text", pa.string()), ("position", pa.float64())]))),
        # Candidates that were not kept, and why.
        (
            "candidates",
            pa.list_(
                pa.struct(
                    [
                        ("stage", pa.string()),
                        ("candidate", pa.int32()),
                        ("reason", pa.string()),
                        ("detail", pa.string()),
                        ("text", pa.string()),
                    ]
                )
            ),
        ),
        ("calls", pa.int32()),  # answered calls, all stages, attempts and candidates
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("cost", pa.float64()),  # in the currency of the config's prices
        ("attention", pa.float64()),  # the student's attention to the image over the chain; null: not measured
        ("weight", pa.float64()),  # of the row in training; 1 unless attention decided otherwise
    ]
)
