"""Records of a file, a folder or a hub name as they are stored, one after the other."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_avar.data.json_rows import json_rows
from verl_avar.data.published import read
from verl_avar.errors import ConfigError

BATCH = 64  # rows of a parquet file in memory
PEEKED = 64  # records whose keys make the columns of a file without a schema
SUFFIXES = (".parquet", ".jsonl", ".json", ".tsv", ".csv")
# Files beside a data set that describe it.
NOT_DATA = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json", "config.json")
SPLITS = ("train", "validation", "valid", "val", "dev", "test", "testmini", "data")


@dataclass(frozen=True)
class Records:
    """Records of one source. A ValueError among `rows` is a record that can't be read and says why."""

    name: str  # of the file, the folder or on the hub
    split: str | None  # None: of one file, which is its own split
    columns: list[str]
    rows: Iterable[dict | ValueError]
    folders: tuple[Path, ...] = ()  # what relative paths of images are relative to, the nearest first


def open_records(path: str, split: str | None = "train", limit: int | None = None) -> Records:
    """Records of a .parquet, .jsonl, .json, .tsv or .csv file, of a folder, or of a hub name.

    A folder is one that `datasets.save_to_disk` wrote, or has its rows in files of one kind, up to two levels down:
    those with the split in their name (train.json, data/train-00000-of-00002.parquet), else, for `train`, all of them
    if none names a split; without a split all of them. A hub name is downloaded into the cache of `datasets`; with a
    `limit`, and where it is not in the cache and the network may be used, only as much as is read. Raises ConfigError
    where there are no records.
    """
    found = Path(path).expanduser()
    if found.is_file():
        return _of_files([found], found.stem, None, (found.parent,))
    if not found.is_dir():
        return _of_hub(path, split, limit)
    if (found / "state.json").is_file() or (found / "dataset_dict.json").is_file():
        return _saved(found, split)
    if split is not None and (found / split / "state.json").is_file():
        return _saved(found / split, split)
    files = _index_files(found, split)
    return _of_files(files, found.resolve().name, split, tuple(dict.fromkeys((files[0].parent, found))))


def _index_files(folder: Path, split: str | None) -> list[Path]:
    """The files of a folder that hold the rows of a split, or of all of them."""
    data = sorted(
        file
        for pattern in ("*", "*/*", "*/*/*")
        for file in folder.glob(pattern)
        if file.suffix in SUFFIXES and file.name not in NOT_DATA and not file.name.startswith(".") and file.is_file()
    )
    if not data:
        raise ConfigError(f"{folder}: no rows in it; a folder needs a file of {', '.join(SUFFIXES)}")
    named = {file: {part for part in re.split(r"[^A-Za-z0-9]+", file.stem.lower()) if part in SPLITS} for file in data}
    files = [file for file in data if split is None or split.lower() in named[file] or file.parent.name == split]
    if not files and split in ("train", "data") and not any(named.values()):
        files = data
    if not files:
        raise ConfigError(f"{folder}: no file for split {split}; there are {_names(data, folder)}")
    if len({file.suffix for file in files}) > 1:
        raise ConfigError(f"{folder}: rows in files of several kinds, {_names(files, folder)}; name one file")
    shards = all(re.search(r"\d{5}-of-\d{5}", file.name) for file in files)
    if len(files) > 1 and split is not None and not shards and any(named.values()):
        raise ConfigError(f"{folder}: several files for split {split}, {_names(files, folder)}; name one file")
    return files


def _names(files: list[Path], folder: Path) -> str:
    shown = [str(file.relative_to(folder)) for file in files[:8]]
    return ", ".join(shown) + (f" and {len(files) - 8} more" if len(files) > 8 else "")


def _of_files(files: list[Path], name: str, split: str | None, folders: tuple[Path, ...]) -> Records:
    if files[0].suffix == ".parquet":
        return Records(name, split, _parquet_columns(files), _parquet_rows(files), folders)
    if files[0].suffix not in SUFFIXES:
        raise ConfigError(f"{files[0]}: a file of rows is one of {', '.join(SUFFIXES)}")
    read_file = json_rows if files[0].suffix in (".json", ".jsonl") else _table_rows
    return _peeked(name, split, itertools.chain.from_iterable(map(read_file, files)), folders)


def _peeked(name: str, split: str | None, rows: Iterator[dict | ValueError], folders: tuple[Path, ...]) -> Records:
    """Records whose columns are the keys of the first of them."""
    first = list(itertools.islice(rows, PEEKED))
    columns = list(dict.fromkeys(key for row in first if isinstance(row, dict) for key in row))
    return Records(name, split, columns, itertools.chain(first, rows), folders)


def _parquet_columns(files: list[Path]) -> list[str]:
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    try:
        return pq.read_schema(files[0]).names
    except (ArrowException, OSError) as error:
        raise ConfigError(f"{files[0]}: not a parquet file: {' '.join(str(error).split())}") from error


def _parquet_rows(files: list[Path]) -> Iterator[dict]:
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=BATCH):
                    yield from batch.to_pylist()
        except (ArrowException, OSError) as error:
            raise ConfigError(f"{path}: a damaged parquet file: {' '.join(str(error).split())}") from error


def _table_rows(path: Path) -> Iterator[dict | ValueError]:
    """Rows of a .tsv or .csv with a header; an empty cell is None."""
    csv.field_size_limit(1 << 30)  # images in base64 are cells
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        try:
            for row in reader:
                if None in row or None in row.values():
                    yield ValueError(f"line {reader.line_num} has not as many cells as the header")
                else:
                    yield {column: cell or None for column, cell in row.items()}
        except (csv.Error, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}, after line {reader.line_num}: {error}") from error


def _saved(folder: Path, split: str | None) -> Records:
    """What `datasets.save_to_disk` wrote, memory-mapped."""
    from datasets import DatasetDict, load_from_disk

    from verl_avar.data.published import undecoded

    rows = load_from_disk(str(folder))
    if isinstance(rows, DatasetDict):
        if split not in rows:
            raise ConfigError(f"{folder}: no split {split}; there are {', '.join(rows)}")
        rows = rows[split]
    return Records(folder.resolve().name, split, rows.column_names, undecoded(rows), (folder,))


def _of_hub(name: str, split: str | None, limit: int | None) -> Records:
    from verl_avar.data.published import check_reachable, in_cache, stream

    if split is None:
        check_reachable(name)
        raise ConfigError(f"{name}: name the split, such as {name}@test")
    source = f"{name}@{split}"
    check_reachable(source)
    if limit is not None and not in_cache(name):
        return _peeked(name, split, iter(stream(source)), ())
    table = read(source)
    return Records(table.name, split, table.columns, table.rows, ())


def first_present(row: dict[str, Any], names: Iterable[str]) -> Any:
    """The value of the first of the columns that a record has and that is not empty; None for none."""
    return next((row[name] for name in names if row.get(name) not in (None, "", [])), None)
