"""Checkpoints as points of a correlation: VAS against accuracy, from `avar vas` files, CSV files and the paper."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SCOPES = ("user", "response")
MEASURES = ("vas", "head_mean", "median")
PUBLISHED = Path(__file__).parent / "published" / "vas_stages.csv"


@dataclass(frozen=True)
class Point:
    """One checkpoint: its VAS and its accuracy, the latter in any unit that all points share (usually %)."""

    name: str
    vas: float
    accuracy: float
    source: str = ""
    gated: bool = False  # of a cross-attention model: its VAS is on a scale of its own (families/README.md)


def published_points() -> list[Point]:
    """The four stages of which the paper publishes VAS (user scope, 200 MathVista samples) and accuracy (in %, the
    average of its seven benchmarks).
    """
    return read_csv(PUBLISHED)


def read_points(arguments: Sequence[str], scope: str = "user", measure: str = "vas") -> list[Point]:
    """Points from the command line's words, in order.

    Each is `path/to/vas.json=ACCURACY`, `NAME:path/to/vas.json=ACCURACY`, or a CSV file with a header and the columns
    name, accuracy and either vas or vas_json (relative to the CSV file). vas.json is what `avar vas` writes, and its
    folder stands for it; `scope` and `measure` choose its number. Raises OSError or ValueError, naming the word or the
    line of the file.
    """
    points: list[Point] = []
    for argument in arguments:
        if Path(argument).suffix.lower() == ".csv":
            points += read_csv(argument, scope, measure)
            continue
        path, equals, accuracy = argument.rpartition("=")
        if not equals:
            raise ValueError(f"'{argument}': write vas.json=ACCURACY, NAME:vas.json=ACCURACY or a .csv file")
        name, colon, rest = path.partition(":")
        named = bool(colon) and not Path(path).exists()  # a path may hold a colon itself
        points.append(_measured(rest if named else path, name if named else "", accuracy, argument, scope, measure))
    return points


def read_csv(path: str | Path, scope: str = "user", measure: str = "vas") -> list[Point]:
    """Points of one CSV file, as `read_points` says; a column `source` is kept."""
    points = []
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    reader = csv.DictReader(text.splitlines(), skipinitialspace=True)
    columns = set(reader.fieldnames or ())
    if not ({"name", "accuracy"} <= columns and columns & {"vas", "vas_json"}):
        raise ValueError(f"{path}: wants the columns name,vas,accuracy or name,vas_json,accuracy in its first line")
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        if not row["name"]:
            raise ValueError(f"{where}: no name")
        if row.get("vas"):
            vas, accuracy = _number(row["vas"], "VAS", where), _number(row["accuracy"], "accuracy", where)
            points.append(Point(row["name"], vas, accuracy, row.get("source") or str(path)))
        elif row.get("vas_json"):
            file = Path(path).parent / row["vas_json"]
            points.append(_measured(file, row["name"], row["accuracy"], where, scope, measure))
        else:
            raise ValueError(f"{where}: neither vas nor vas_json")
    return points


def _measured(path: str | Path, name: str, accuracy: str, where: str, scope: str, measure: str) -> Point:
    """A point from a vas.json; its own name or its model's where none is given."""
    path = Path(path) / "vas.json" if Path(path).is_dir() else Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no UTF-8, or no JSON
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("scopes"), dict):
        raise ValueError(f"{path} is not a vas.json")
    value = content["scopes"].get(scope, {}).get(measure)
    if value is None:
        raise ValueError(f"{path} has no scopes.{scope}.{measure}: measure it with `avar vas`, or choose another")
    name = name or content.get("name") or Path(str(content.get("model", ""))).name or str(path)
    numbers = _number(value, "VAS", str(path)), _number(accuracy, "accuracy", where)
    return Point(name, *numbers, str(path), bool(content.get("cross_attention")))


def _number(text: str | float | None, what: str, where: str) -> float:
    if text is None:
        raise ValueError(f"{where}: no {what}")
    try:
        return float(text)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: the {what} '{text}' is not a number") from None
