"""Where a person's copies of benchmarks are, and their records one after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from verl_avar.data.records import Records, open_records
from verl_avar.errors import ConfigError
from verl_avar.evaluation.benchmark.definition import Benchmark, Part

REFERENCE = 64  # a cell of at most so many characters in VLMEvalKit's column `image` is the index of another row
KINDS = (".tsv", ".parquet", ".jsonl", ".json")


def find_copy(benchmark: Benchmark, part: Part, data: Path) -> Path | None:
    """The one file or folder of a part in a folder of copies; None for none.

    data: a file, which is the copy of a benchmark with one part; or a folder with, for each part, VLMEvalKit's file by
    its name; NAME.tsv, NAME.parquet, NAME.jsonl or NAME.json; a folder NAME; or a download of the hub's repository
    under the name's end (MathVista). NAME is the benchmark's, or BENCHMARK_PART where there are several parts. Raises
    ConfigError for a path that is not there, for a file where several parts are needed, and for two copies.
    """
    data = Path(data).expanduser()
    if not data.exists():
        raise ConfigError(f"{data}: no such file or folder")
    if data.is_file():
        if len(benchmark.parts) > 1:
            wanted = ", ".join(expected(benchmark, each)[0] for each in benchmark.parts)
            raise ConfigError(
                f"{data}: {benchmark.name} has {len(benchmark.parts)} tables; name a folder with {wanted}"
            )
        return data
    found = [path for path in (data / name for name in expected(benchmark, part)) if path.exists()]
    if len(found) > 1:
        raise ConfigError(f"{data}: two copies of {benchmark.name}, {found[0].name} and {found[1].name}; leave one")
    return found[0] if found else None


def expected(benchmark: Benchmark, part: Part) -> list[str]:
    """Paths, relative to a folder of copies, at which a part is looked for."""
    name = benchmark.name if len(benchmark.parts) == 1 else f"{benchmark.name}_{part.name}"
    paths = [part.tsv] if part.tsv else []
    paths += [path for path in (f"{name}{kind}" for kind in KINDS) if path not in paths]
    if part.hub:
        paths.append(str(Path(part.hub.rpartition("/")[2]) / (part.path or "")))
    return [*dict.fromkeys([*paths, name])]


def missing(benchmark: Benchmark, part: Part, data: Path | None) -> ConfigError:
    """What to say where a part is not there."""
    ways = []
    if part.tsv:
        ways.append(f"VLMEvalKit's {part.tsv}")
    if part.hub:
        download = f"hf download --repo-type dataset {part.hub} --local-dir {part.hub.rpartition('/')[2]}"
        ways.append(f"the hub's {part.hub} ({download})")
    what = benchmark.name if len(benchmark.parts) == 1 else f"{benchmark.name}, {part.name}"
    where = f"not in {data}" if data else "no copy"
    return ConfigError(
        f"{what}: {where}; put {' or '.join(ways)} there, or one of {', '.join(expected(benchmark, part))}"
    )


@contextmanager
def opened(benchmark: Benchmark, part: Part, data: Path | None) -> Iterator[Records]:
    """Records of a part, images that point to another row as the files they point to.

    data: as `find_copy` takes it; None: the hub name, from the cache or the network, or what the part generates.
    Raises ConfigError where there are none.
    """
    path = None if data is None else find_copy(benchmark, part, data)
    if path is not None:
        with _resolved(path, part) as records:
            yield records
    elif part.generate:
        with _generated(part) as records:
            yield records
    elif data is not None or part.hub is None:
        raise missing(benchmark, part, data)
    else:
        yield _of_hub(part)


def _of_hub(part: Part) -> Records:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    from verl_avar.data.published import check_reachable, undecoded

    check_reachable(part.hub)
    try:
        rows = undecoded(load_dataset(part.hub, part.config, split=part.split))
    except (DatasetsError, OSError, ValueError) as error:
        raise ConfigError(f"{part.hub}: no rows can be read: {' '.join(str(error).split())[:300]}") from error
    return Records(part.hub, part.split, rows.column_names, rows)


@contextmanager
def _generated(part: Part) -> Iterator[Records]:
    from verl_avar.miniature.data import write_eval

    with tempfile.TemporaryDirectory() as folder:
        path = write_eval(Path(folder) / "eval.parquet", part.generate["rows_per_task"], part.generate["seed"])
        yield open_records(str(path))


@contextmanager
def _resolved(path: Path, part: Part) -> Iterator[Records]:
    """Records with each `image` that is another row's index replaced by that row's image.

    A copy is read once for the references, and once more for what they point to, which waits in a file: a benchmark's
    images may not fit into memory, and the row may come later.
    """
    records = open_records(str(path), part.split)
    if not _has_text_images(records):
        yield open_records(str(path), part.split)
        return
    short = {cell for cell in map(_short, open_records(str(path), part.split).rows) if cell}
    if not short:
        yield open_records(str(path), part.split)
        return
    again = open_records(str(path), part.split)
    with tempfile.TemporaryFile() as file:
        places: dict[str, tuple[int, int] | None] = {}
        for record in again.rows:
            if isinstance(record, dict) and str(record.get("index")) in short:
                cell = record.get("image")
                held = isinstance(cell, str) and len(cell) > REFERENCE
                places[str(record["index"])] = (file.tell(), file.write(cell.encode())) if held else None
        final = open_records(str(path), part.split)
        yield replace(final, rows=(_with_image(record, places, file) for record in final.rows))


def _has_text_images(records: Records) -> bool:
    if not {"image", "index"} <= set(records.columns):
        return False
    cells = (record.get("image") for record in records.rows if isinstance(record, dict))
    return isinstance(next((cell for cell in cells if cell is not None), None), str)


def _short(record: dict | ValueError) -> str | None:
    cell = record.get("image") if isinstance(record, dict) else None
    return cell if isinstance(cell, str) and len(cell) <= REFERENCE else None


def _with_image(record: dict | ValueError, places: dict, file: Any) -> dict | ValueError:
    cell = _short(record)
    if cell is None or cell not in places:
        return record
    if places[cell] is None:
        return ValueError(f"the image is that of row {cell}, which has none of its own")
    start, length = places[cell]
    file.seek(start)
    return record | {"image": file.read(length).decode()}
