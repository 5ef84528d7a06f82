"""Reading rows of published data sets, and writing them with their images inside, a batch at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from verl_avar.data.parquet import RowFile
from verl_avar.data.schema import IMAGE
from verl_avar.errors import ConfigError

BATCH = 256  # rows in memory at a time
FILES = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}


@dataclass(frozen=True)
class Table:
    """Rows of one source, images as {bytes, path} or paths."""

    name: str  # without the split
    split: str
    columns: list[str]
    rows: Iterable[dict]
    folder: Path | None  # what relative paths of images are relative to; None for a hub name


def named(source: str) -> tuple[str, str]:
    """ "NAME@split" -> (NAME, split); the split is `train` where none is given."""
    name, split = re.fullmatch(r"(.+?)(?:@(\w+))?", source, re.DOTALL).groups()
    return name, split or "train"


def read(source: str) -> Table:
    """The rows of a hub name, a folder or a file. Raises ConfigError where they can't be had."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, split = named(source)
    path = Path(name).expanduser()
    try:
        if path.is_file():
            if path.suffix not in FILES:
                raise ConfigError(f"{source}: a source's file is one of {', '.join(FILES)}")
            rows = load_dataset(FILES[path.suffix], data_files={split: str(path)}, split=split)
        else:
            rows = load_dataset(str(path) if path.is_dir() else name, split=split)
    except ConfigError:
        raise
    except (DatasetsError, OSError, ValueError) as error:
        raise ConfigError(f"{source}: no rows can be read: {' '.join(str(error).split())[:300]}") from error
    rows = undecoded(rows)
    local = path.exists()
    folder = (path if path.is_dir() else path.parent) if local else None
    return Table(path.stem if local else name, split, rows.column_names, rows, folder)


def undecoded(rows: Any) -> Any:
    """Images as the bytes or the path that they are stored as: most need no second encoding."""
    from datasets import Image as ImageFeature
    from datasets import List

    for name, feature in (rows.features or {}).items():  # a stream without a schema holds no image features
        if isinstance(feature, ImageFeature):
            rows = rows.cast_column(name, ImageFeature(decode=False))
        elif isinstance(getattr(feature, "feature", None), ImageFeature):
            rows = rows.cast_column(name, List(ImageFeature(decode=False)))
    return rows


def check_reachable(source: str) -> None:
    """Raises ConfigError for a source that is not there: a missing path, or a hub name without network and cache."""
    from huggingface_hub import constants

    name, _ = named(source)
    if Path(name).expanduser().exists():
        return
    if name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ConfigError(f"{source}: no such file or folder, and no hub name")
    if constants.HF_HUB_OFFLINE and not in_cache(name):
        raise ConfigError(
            f"{source}: not in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set; `hf download --repo-type dataset "
            f"{name}` where there is a network, or name a folder"
        )


def in_cache(name: str) -> bool:
    """Whether a hub name was downloaded before, or built by `datasets`."""
    from huggingface_hub import constants

    cached = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
    built = Path(os.environ.get("HF_DATASETS_CACHE", Path(constants.HF_HOME) / "datasets")) / name.replace("/", "___")
    return cached.exists() or built.exists()


def stream(source: str) -> Iterable[dict]:
    """The rows of a hub name while they are downloaded. Raises ConfigError where they can't be had."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, split = named(source)
    try:
        yield from undecoded(load_dataset(name, split=split, streaming=True))
    except (DatasetsError, OSError, ValueError) as error:
        raise ConfigError(f"{source}: no rows can be read: {' '.join(str(error).split())[:300]}") from error


def only_column(table: Table, candidates: tuple[str, ...], source: str, what: str) -> str:
    """The one column of `candidates` that a table has. Raises ConfigError for none, and for more than one."""
    found = [name for name in candidates if name in table.columns]
    if len(found) != 1:
        raise ConfigError(
            f"{source}: {what} must be in one column named {' or '.join(candidates)}; the columns are "
            f"{', '.join(table.columns)}"
        )
    return found[0]


def placed(messages: list[dict[str, str]], images: int, where: str) -> list[dict[str, str]]:
    """Messages with as many placeholders as images: as they are, or all before the first user's text.

    Raises ConfigError where there are some placeholders, but not that many.
    """
    there = sum(message["content"].count(IMAGE) for message in messages)
    if there == images:
        return messages
    if there:
        raise ConfigError(f"{where}: {there} {IMAGE} in the text, {images} images")
    first = next(i for i, message in enumerate(messages) if message["role"] == "user")
    user = messages[first] | {"content": IMAGE * images + messages[first]["content"]}
    return [*messages[:first], user, *messages[first + 1 :]]


def write(path: Path | str, schema: pa.Schema, rows: Iterator[dict]) -> None:
    """Writes rows beside the target and renames, so that the target is always whole. Raises ConfigError for none."""
    with RowFile(Path(path), schema, BATCH) as file:
        for row in rows:
            file.add(row)
        if not file.count:
            raise ConfigError(f"{path}: the sources have no row with an image")


def file_states(path: Path) -> list[tuple[str, int, int]]:
    """(name, size, time of change) of a file, or of each file below a folder; empty for a hub name."""
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    states = ((str(each), each.stat()) for each in files if each.exists())
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in states]
