"""`avar data`: data sets of image questions brought to one schema, checked, and hashed.

avar data sources                                    the readers, and what they read
avar data convert PATH --reader R --out rows.parquet a data set as rows of the schema
avar data validate FILE                              what is wrong with the first broken rows
avar data hashes BENCHMARK … --out hashes.parquet    questions and image hashes of your copies of benchmarks
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from verl_avar.errors import ConfigError

SHOWN = 5  # broken rows that are explained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `avar data`."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="data_command")
    commands.add_parser("sources", help="the readers, and what they read")

    convert = commands.add_parser("convert", help="a data set as rows of the schema")
    convert.add_argument("path", help="file, folder or hub name")
    convert.add_argument("--reader", default="generic", help="see `avar data sources` (default: generic)")
    convert.add_argument("--split", default="train", help="default: train")
    convert.add_argument("--limit", type=int, metavar="N", help="records read, from the start (default: all)")
    convert.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="OURS=THEIRS",
        help="for the generic reader: where question, answer, choices or images are; may be given again",
    )
    convert.add_argument("--max-pixels", type=int, help="larger images are scaled down to this (default: 1003520)")
    convert.add_argument("--out", type=Path, required=True, help="parquet file to write")

    validate = commands.add_parser("validate", help="what is wrong with the first broken rows of a parquet file")
    validate.add_argument("file", type=Path, help="rows of the schema, or verl's SFT or RL rows")

    hashes = commands.add_parser("hashes", help="questions and image hashes of your copies of benchmarks")
    hashes.add_argument("benchmarks", nargs="+", metavar="BENCHMARK", help="file or folder, with @SPLIT or not")
    hashes.add_argument("--out", type=Path, required=True, help="parquet file to write")


def run(arguments: argparse.Namespace) -> int:
    """Runs `avar data`; returns the exit status: 0, 1 where `validate` found broken rows, 2 for what can't be read."""
    try:
        return COMMANDS[arguments.data_command](arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def sources(arguments: argparse.Namespace) -> int:
    """Prints the readers."""
    from rich.console import Console
    from rich.table import Table

    from verl_avar.data.sources import READERS

    table = Table(box=None, pad_edge=False)
    for title in ("reader", "data set", "rows", "columns"):
        table.add_column(title, no_wrap=title in ("reader", "data set"))
    for reader in READERS.values():
        columns = (" or ".join(names) + "?" * part.endswith("?") for part, names in reader.columns.items())
        table.add_row(reader.name, reader.hub or "any", reader.rows, ", ".join(columns))
    Console().print(table)
    return 0


def convert(arguments: argparse.Namespace) -> int:
    """Writes rows of the schema; broken records are left out and told."""
    from verl_avar.data.parquet import RowFile
    from verl_avar.data.reader import Broken
    from verl_avar.data.schema import MAX_PIXELS, ROWS
    from verl_avar.data.sources import read_source

    if wrong := [each for each in arguments.column if "=" not in each]:
        raise ConfigError(f"--column {wrong[0]}: write OURS=THEIRS, such as question=query")
    columns = dict(each.split("=", 1) for each in arguments.column)
    broken = []
    with RowFile(arguments.out, ROWS, 64) as file:
        for row in read_source(
            arguments.path,
            arguments.reader,
            arguments.split,
            arguments.limit,
            columns,
            arguments.max_pixels or MAX_PIXELS,
        ):
            if isinstance(row, Broken):
                broken.append(f"row {row.source_row}, {row.reason}: {row.detail}")
            else:
                file.add(row)
        if not file.count:
            raise ConfigError(f"{arguments.path}: no rows{'; ' + broken[0] if broken else ''}")
    print(f"{arguments.out}: {file.written:,} rows" + (f", {len(broken):,} left out" if broken else ""))
    tell(broken)
    return 0


def validate(arguments: argparse.Namespace) -> int:
    """Explains the first broken rows of a file."""
    from verl_avar.data.validate import faults

    rows, broken = 0, []
    for number, fault in faults(arguments.file):
        rows += 1
        if fault:
            broken.append(f"row {number}, {fault.column}: {fault.what}. To fix: {fault.fix}.")
    if not rows:
        raise ConfigError(f"{arguments.file}: no rows")
    print(f"{arguments.file}: {rows:,} rows, {f'{len(broken):,} broken' if broken else 'all fine'}")
    tell(broken)
    return 1 if broken else 0


def hashes(arguments: argparse.Namespace) -> int:
    """Writes questions and image hashes of benchmarks."""
    from verl_avar.data.benchmarks import write_hashes
    from verl_avar.data.reader import Broken

    broken: list[Broken] = []
    counts = write_hashes(arguments.benchmarks, arguments.out, broken)
    for benchmark, rows in counts.items():
        print(f"{benchmark}: {rows:,} questions")
    print(f"{arguments.out}: {sum(counts.values()):,} questions" + (f", {len(broken):,} left out" if broken else ""))
    tell([f"{row.source}, row {row.source_row}: {row.detail}" for row in broken])
    return 0


def tell(broken: Iterable[str]) -> None:
    """The first of the lines, and how many more there are."""
    lines = list(broken)
    for line in lines[:SHOWN]:
        print(f"  {line}")
    if len(lines) > SHOWN:
        print(f"  and {len(lines) - SHOWN:,} more")


COMMANDS = {"sources": sources, "convert": convert, "validate": validate, "hashes": hashes}
