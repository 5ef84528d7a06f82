"""Benchmarks' questions and how their images look, from a person's own copies, and as a file to give away.

The file holds texts and hashes, no images: `avar data hashes` writes it, `overlap.hashes` of a synthesis config reads
it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from verl_avar.data.fingerprints import GRID, look_of, stem
from verl_avar.data.images import encoded, located, stored_images
from verl_avar.data.parquet import RowFile
from verl_avar.data.published import named
from verl_avar.data.reader import Broken
from verl_avar.data.records import Records, first_present, open_records
from verl_avar.data.schema import MAX_PIXELS
from verl_avar.data.similar import Question
from verl_avar.errors import ConfigError

HASHES = pa.schema(
    [
        pa.field("benchmark", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("question", pa.string(), nullable=False),  # fingerprints.stem; "" where it stands in the image
        pa.field("hashes", pa.list_(pa.uint64()), nullable=False),  # of each image, fingerprints.look_of
        pa.field("thumbnails", pa.list_(pa.binary(GRID * GRID * 3)), nullable=False),
    ]
)
# MathVerse's vision-only rows have their question in `question_for_eval`.
QUESTIONS = ("question", "question_for_eval", "problem", "query", "query_wo")
# MathVista and MathVision have a path in `image` and the image in `decoded_image`.
IMAGES = ("decoded_image", "images", "image", "image_path", "img_path")
NUMBERED = tuple(f"image_{number}" for number in range(1, 10))  # MMMU
REFERENCE = 64  # a shorter text in VLMEvalKit's column `image` is the `index` of the row that has the image


def read_benchmark(source: str) -> Iterator[Question | Broken]:
    """The questions of a local copy, with @SPLIT or all of its splits; a `Broken` for a row that can't be read.

    Columns: a question (QUESTIONS, the first that a row has); images (IMAGES, the first that there is, or image_1,
    image_2, …), as files' bytes, paths, or base64 as in VLMEvalKit's TSV files, where an image may also be the index of
    an earlier row. Raises ConfigError for a source without such columns.
    """
    name, split = named(source)
    records = open_records(name, split if "@" in source and source != name else None)
    columns = _image_columns(records, source)
    benchmark = records.name if records.split is None else f"{records.name}@{records.split}"
    before: dict[str, tuple[tuple[int, bytes], ...]] = {}  # looks of rows that have an index
    for number, record in enumerate(records.rows):
        try:
            if isinstance(record, ValueError):
                raise record
            looks = _looks(record, columns, records, before)
            text = first_present(record, QUESTIONS)
            asked = stem(str(text)) if text is not None else ""
            if not asked and not looks:
                raise ValueError("neither a question nor an image")
        except ValueError as error:
            yield Broken(benchmark, number, "bad_row", " ".join(str(error).split()))
        else:
            yield Question(benchmark, number, asked, tuple(look[0] for look in looks), tuple(look[1] for look in looks))


def _image_columns(records: Records, source: str) -> list[str]:
    """The columns that images are in; none for a benchmark of texts."""
    if not any(name in records.columns for name in QUESTIONS):
        raise ConfigError(
            f"{source}: a benchmark's questions must be in a column {' or '.join(QUESTIONS)}; the columns are "
            f"{', '.join(records.columns)}"
        )
    numbered = [name for name in NUMBERED if name in records.columns]
    single = [name for name in IMAGES if name in records.columns]
    return numbered or single[:1]


def _looks(record: dict, columns: list[str], records: Records, before: dict) -> tuple[tuple[int, bytes], ...]:
    cells = [record.get(name) for name in columns]
    index = record.get("index")
    if columns == ["image"] and index is not None and _is_reference(cells[0], before):
        looks = before[str(cells[0])]
    else:
        looks = tuple(_look(image, records) for cell in cells for image in stored_images(cell))
    if columns == ["image"] and index is not None:
        before[str(index)] = looks
    return looks


def _is_reference(cell: Any, before: dict) -> bool:
    return isinstance(cell, str) and len(cell) <= REFERENCE and cell in before


def _look(image: Any, records: Records) -> tuple[int, bytes]:
    # As sources are read: the same picture must have the same hash.
    return look_of(encoded(located(image, records.folders), None, MAX_PIXELS, "an image")["bytes"])


def write_hashes(sources: list[str], path: Path, broken: list[Broken] | None = None) -> dict[str, int]:
    """Writes the questions of local copies in schema HASHES; rows by benchmark. Unreadable rows go to `broken`.

    Raises ConfigError for a benchmark of which nothing can be read, and then leaves no file.
    """
    counts: dict[str, int] = {}
    with RowFile(path, HASHES, 1024) as file:
        for source in sources:
            for question in checked(source, [] if broken is None else broken):
                counts[question.benchmark] = counts.get(question.benchmark, 0) + 1
                file.add(
                    {
                        "benchmark": question.benchmark,
                        "row": question.row,
                        "question": question.stem,
                        "hashes": question.hashes,
                        "thumbnails": question.thumbnails,
                    }
                )
    return counts


def checked(source: str, broken: list[Broken]) -> Iterator[Question]:
    """The questions of a local copy; unreadable rows go to `broken`. Raises ConfigError where no row can be read."""
    read, first = 0, None
    for question in read_benchmark(source):
        if isinstance(question, Broken):
            broken.append(question)
            first = first or question
        else:
            read += 1
            yield question
    if not read:
        why = f"; row {first.source_row}: {first.detail}" if first else ""
        raise ConfigError(f"{source}: no question can be read{why}")


def read_hashes(path: Path | str) -> Iterable[Question]:
    """The questions of a file that `write_hashes` wrote. Raises ConfigError for another file."""
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: no file of `avar data hashes`: {' '.join(str(error).split())}") from error
    if not table.schema.equals(HASHES):
        raise ConfigError(
            f"{path}: no file of this version's `avar data hashes`; its columns are {', '.join(table.column_names)}"
        )
    for row in table.to_pylist():
        yield Question(row["benchmark"], row["row"], row["question"], tuple(row["hashes"]), tuple(row["thumbnails"]))
