"""Questions of a benchmark from a local copy, from the hub or made here, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from verl_avar.data.reader import Broken
from verl_avar.data.records import Records
from verl_avar.errors import ConfigError
from verl_avar.evaluation.benchmark.copies import opened
from verl_avar.evaluation.benchmark.definition import Benchmark, Layout, Part
from verl_avar.evaluation.benchmark.question import LeftOut, question_of

SHOWN = 5  # broken rows that a message names


def load(
    definition: Benchmark,
    data: Path | str | None = None,
    limit: int | None = None,
    allow_broken: bool = False,
    broken: list[Broken] | None = None,
) -> Iterator[dict]:
    """Rows of schema.QUESTIONS, in the copy's order, part after part; one row in memory at a time.

    data: a file or folder as `copies.find_copy` takes it; None: the hub name, or what the definition generates.
    limit: questions of each part, from the start, at most. broken: takes the rows that are no question (`source` is
    the benchmark's name, or BENCHMARK/PART).

    An id is the copy's own, after "PART/" where there are several parts. A row whose id was there before is broken.
    Images are the copy's files, PNG, JPEG and WebP as they are, others as PNG, in any size. Raises ConfigError, before
    the first row, for a copy that is missing or has other columns; after the last row where rows are broken and
    `allow_broken` is not set; and where no question is left.
    """
    bad: list[Broken] = [] if broken is None else broken
    before, count = len(bad), 0
    path = None if data is None else Path(data)
    for part in definition.parts:
        for question in _of_part(definition, part, path, limit, bad):
            count += 1
            yield question
    found = bad[before:]
    if found and not allow_broken:
        named = "; ".join(f"{each.source} row {each.source_row}: {each.detail}" for each in found[:SHOWN])
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise ConfigError(
            f"{definition.name}: {len(found)} of {count + len(found)} rows are no question: {named}{more}; "
            "--allow-broken leaves them out"
        )
    if not count:
        raise ConfigError(f"{definition.name}: no question in {data or 'its source'}")


def _of_part(
    definition: Benchmark, part: Part, data: Path | None, limit: int | None, bad: list[Broken]
) -> Iterator[dict]:
    several = len(definition.parts) > 1
    source = f"{definition.name}/{part.name}" if several else definition.name
    seen: set[str] = set()
    with opened(definition, part, data) as records:
        layout = fitting(definition, part, records)
        keep = {column: value for column, value in part.keep.items() if column in records.columns}
        for number, record in enumerate(records.rows):
            if limit is not None and len(seen) >= limit:
                return
            try:
                if isinstance(record, ValueError):
                    raise record
                if any(str(record.get(column)) != value for column, value in keep.items()):
                    continue
                question = question_of(record, definition, part, layout, records.folders)
                if question["id"] in seen:
                    raise ValueError(f"the id {question['id']} occurs twice")
            except LeftOut:
                continue
            except ValueError as error:  # ConfigError is one
                bad.append(Broken(source, number, "bad_row", " ".join(str(error).split()).removeprefix("the row: ")))
            else:
                seen.add(question["id"])
                yield question | {"id": f"{part.name}/{question['id']}"} if several else question


def fitting(definition: Benchmark, part: Part, records: Records) -> Layout:
    """The first layout whose columns are there. Raises ConfigError for none."""
    for layout in definition.layouts:
        if all(column in records.columns for column in layout.needs):
            return layout
    lacking = " or ".join(
        ", ".join(column for column in layout.needs if column not in records.columns) for layout in definition.layouts
    )
    raise ConfigError(
        f"{records.name}: no copy of {definition.name}: it lacks the columns {lacking}; it has "
        f"{', '.join(records.columns) or 'none'}"
    )
