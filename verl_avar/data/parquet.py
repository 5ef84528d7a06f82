"""A parquet file that is either whole or not there."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq


class RowFile:
    """Rows for a parquet file, `batch` of them in memory and in a row group; written beside the target and renamed.

    with RowFile(path, schema, 64) as file:
        file.add(row)
    """

    def __init__(self, path: Path, schema: pa.Schema, batch: int):
        self.path, self.schema, self.batch = path, schema, batch
        self.written = 0
        self._rows: list[dict] = []
        self._part = path.with_name(f".{path.name}.{os.getpid()}")

    def __enter__(self) -> RowFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = pq.ParquetWriter(self._part, self.schema)
        return self

    def add(self, row: dict) -> None:
        """Takes one row, in the schema's columns. Raises pyarrow's ArrowInvalid or TypeError for another."""
        self._rows.append(row)
        if len(self._rows) == self.batch:
            self._flush()

    @property
    def count(self) -> int:
        """Rows taken so far."""
        return self.written + len(self._rows)

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self.schema))
            self.written += len(self._rows)
            self._rows.clear()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._flush()
            self._writer.close()
            if kind is None:
                self._part.replace(self.path)
        finally:
            self._part.unlink(missing_ok=True)
