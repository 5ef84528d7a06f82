"""The first part of a synthesis run: the sources' rows in one file, without what must not be trained on.

OUT/rows.parquet     rows of data/schema.py, in the order of the sources
OUT/intake.parquet   rows that were left out, and why
OUT/intake.json      settings that both were made with, and counts
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
from omegaconf import DictConfig, OmegaConf

from verl_avar.data.parquet import RowFile
from verl_avar.data.schema import ROWS
from verl_avar.errors import ConfigError

REJECTS = pa.schema(
    [
        ("id", pa.string()),  # null for a record that is no row
        pa.field("source", pa.string(), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),
        # no_image, bad_image, no_question, no_answer, bad_row, duplicate, near_duplicate or benchmark_overlap
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)
GROUP = 64  # rows of a row group, and in memory
SETTINGS = ("sources", "duplicates", "overlap", "max_pixels")  # what decides about the rows
RULES = 2  # of reading and comparing; another number makes every intake be done again


def intake(config: DictConfig, out: Path | str, progress: Callable[[int, int], None] | None = None) -> dict:
    """Reads the sources into `out`, unless that was done with the same settings, files and rules.

    config: `synthesis.config.load`'s. progress: called after each record with the rows kept and left out so far.
    Returns intake.json: `rows` kept, `rejected`, `reasons` (counts), `sources` (name -> rows kept and rejected) and
    `benchmarks` (questions that rows were compared with, and benchmark rows that could not be read).

    Memory: about 1.1 KB a kept row where near-duplicates are looked for, else 0.2 KB; images are held 64 rows at a
    time. Raises ConfigError for a source that can't be read, that has no rows or only broken ones, and where no row is
    left.
    """
    out = Path(out)
    settings = OmegaConf.to_container(config, resolve=True)
    made_with = fingerprint({key: settings[key] for key in SETTINGS})
    summary = out / "intake.json"
    whole = all((out / name).is_file() for name in ("rows.parquet", "intake.parquet"))
    if whole and (done := _done(summary, made_with)) is not None:
        return done
    out.mkdir(parents=True, exist_ok=True)
    summary.unlink(missing_ok=True)  # from here on the files may be of another run than it says
    counts = _read(config, out, progress)
    counts = {"fingerprint": made_with, **counts}
    part = summary.with_name(f".{summary.name}.{os.getpid()}")
    part.write_text(json.dumps(counts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(summary)
    return counts


def _done(summary: Path, made_with: str) -> dict | None:
    try:
        counts = json.loads(summary.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"{summary} is damaged ({error}); delete it, and the rows are read again") from error
    return counts if isinstance(counts, dict) and counts.get("fingerprint") == made_with else None


def _read(config: DictConfig, out: Path, progress: Callable[[int, int], None] | None) -> dict:
    from verl_avar.data.fingerprints import fingerprint as marks
    from verl_avar.data.reader import Broken
    from verl_avar.data.similar import Benchmarks, Seen
    from verl_avar.data.sources import read_source

    duplicates, overlap = config.duplicates, config.overlap
    unread: list[Broken] = []
    benchmarks = Benchmarks(_questions(overlap, unread), overlap.question_similarity, overlap.image_distance)
    seen = Seen(duplicates.exact, duplicates.near, duplicates.question_similarity, duplicates.image_distance)
    reasons: Counter = Counter()
    sources = {}
    with (
        RowFile(out / "rows.parquet", ROWS, GROUP) as kept,
        RowFile(out / "intake.parquet", REJECTS, GROUP) as rejected,
    ):
        for name, source in zip(names(config.sources), config.sources, strict=True):
            before, records, first = (kept.count, rejected.count), 0, None
            for row in read_source(
                source.path, source.reader, source.split, source.limit, source.columns, config.max_pixels, name
            ):
                if isinstance(row, Broken):
                    match, first = row, first or row
                else:
                    records += 1
                    mark = marks(row)
                    match = seen.look(mark) or benchmarks.look(mark)
                if match is None:
                    seen.add(mark)
                    kept.add(row)
                else:
                    reasons[match.reason] += 1
                    rejected.add(_reject(row, match))
                if progress is not None:
                    progress(kept.count, rejected.count)
            if first is not None and not records:
                broken = f"none of its {rejected.count - before[1]} records is a row"
                raise ConfigError(f"source {source.path}: {broken}; row {first.source_row}: {first.detail}")
            if not records:
                raise ConfigError(f"source {source.path}: it has no rows")
            sources[name] = {"rows": kept.count - before[0], "rejected": rejected.count - before[1]}
        if not kept.count:
            raise ConfigError(f"no row is left of {rejected.count}: {_told(reasons)}")
    return {
        "rows": kept.written,
        "rejected": rejected.written,
        "reasons": dict(reasons.most_common()),
        "sources": sources,
        "benchmarks": {"questions": len(benchmarks), "unread": len(unread)},
    }


def _reject(row, match) -> dict:
    """A row of REJECTS, from a row and the Match that it was left out for, or from a Broken."""
    place = (
        {"id": None, "source": match.source, "source_row": match.source_row}
        if row is match
        else {key: row[key] for key in ("id", "source", "source_row")}
    )
    return {**place, "reason": match.reason, "detail": match.detail}


def _told(reasons: Counter) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())


def _questions(overlap: DictConfig, unread: list) -> Iterator:
    """Of the config's benchmarks and files of hashes."""
    from verl_avar.data.benchmarks import checked, read_hashes

    for source in overlap.benchmarks:
        yield from checked(source, unread)
    for path in overlap.hashes:
        yield from read_hashes(path)


def names(sources) -> list[str]:
    """What rows of each source are marked with: `source_name`, and #2, #3, … where several have the same, so that
    (source, source_row) is a row's own.
    """
    from verl_avar.data.sources import source_name

    found: Counter = Counter()
    marked = []
    for source in sources:
        name = source_name(source.path, source.reader, source.split)
        found[name] += 1
        marked.append(name if found[name] == 1 else f"{name}#{found[name]}")
    return marked


def fingerprint(settings: dict) -> str:
    """A hash of the settings, the rules, and size and time of change of every local file that they name."""
    from verl_avar.data.published import file_states, named

    overlap = settings["overlap"]
    paths = [source["path"] for source in settings["sources"]]
    paths += [named(path)[0] for path in overlap["benchmarks"]] + overlap["hashes"]
    files = [file_states(Path(path).expanduser()) for path in paths]
    told = json.dumps([RULES, settings, files], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:32]
