"""A sweep of the intervention: points × rows, run by a backend, each sample's record on disk before the next begins.

OUT/run.json        what is being measured; a rerun with the same settings goes on where the last one stopped
OUT/records.jsonl   a record per point and row (see `Backend`), in the order in which they were done
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from verl_avar.evaluation.rows import Row

PAPER_ALPHAS = ((0.15,), (0.0, 0.05, 0.4, 0.6))  # α_img, α_sys (AVAR §2.3)


@dataclass(frozen=True)
class Strength:
    """One point of a sweep: the bias on the logits of visual and of system keys. Both zero is the baseline."""

    name: str
    visual: float
    system: float

    @property
    def key(self) -> str:
        """What tells points apart, however they were written down."""
        return f"{self.visual:.6g},{self.system:.6g}"

    @property
    def is_baseline(self) -> bool:
        return self.visual == self.system == 0


def strengths(
    beta: Sequence[float] | None = None,
    system_beta: Sequence[float] | None = None,
    alpha_img: Sequence[float] | None = None,
    alpha_sys: Sequence[float] | None = None,
) -> list[Strength]:
    """The points of a sweep, the baseline first: every beta with every system_beta, or every α_img with every α_sys.

    β is added to logits; α is the paper's form, β_visual = log(1 + α_img), β_system = log(1 − α_sys). Without any of
    them, the paper's own α. Raises ValueError where both forms are given, or a value is impossible.
    """
    from verl_avar.attention.bias import MAX_BIAS, bias_of

    by_beta, by_alpha = bool(beta or system_beta), bool(alpha_img or alpha_sys)
    if by_beta and by_alpha:
        raise ValueError("give --beta and --system-beta, or --alpha-img and --alpha-sys, not both")
    if not (by_beta or by_alpha):
        alpha_img, alpha_sys = PAPER_ALPHAS
    first, second = (beta, system_beta) if by_beta else (alpha_img, alpha_sys)
    letter, found = "β" if by_beta else "α", {"0,0": Strength("baseline", 0.0, 0.0)}
    for image, system in itertools.product(first or (0.0,), second or (0.0,)):
        named = [f"{what}{value:g}" for what, value in (("", image), ("sys ", system)) if value]
        name = f"{letter} {', '.join(named)}"
        visual_bias, system_bias = (image, system) if by_beta else bias_of(image, system)
        if bad := [b for b in (visual_bias, system_bias) if not math.isfinite(b) or abs(b) > MAX_BIAS]:
            raise ValueError(f"{name}: a bias of {bad[0]:g} is not within ±{MAX_BIAS:g}")
        point = Strength(name, visual_bias + 0.0, system_bias + 0.0)  # log1p(-0.0) is -0.0, another key
        found.setdefault(point.key, point)
    if len(found) == 1:
        raise ValueError("the only point is the baseline: give a --beta or an --alpha-img other than 0")
    return list(found.values())


@dataclass(frozen=True)
class Task:
    """One row to be answered under one strength."""

    strength: Strength
    number: int  # of the row in its data
    row: Row


# Takes tasks, ordered by strength, and yields for each, in any order, (task, record). A record holds `response` (text),
# `tokens` (its length, end marker included), `cut` (it hit the limit), and, over its response queries under the bias,
# `queries` (how many), `vas`, `head_mean`, `visual`, `system`: None where there is no VAS. Or it holds only `problem`.
Backend = Callable[[Sequence[Task]], Iterator[tuple[Task, dict]]]
Progress = Callable[[Iterable, int], Iterable]  # (records, how many) -> the records


def usable(rows: Sequence[Row]) -> tuple[list[tuple[int, Row]], list[dict]]:
    """Rows with an image and a known answer, by number, and {"row", "reason"} of the others."""
    kept, left_out = [], []
    for number, row in enumerate(rows):
        missing = "no image" if not row.images else "no answer that is a text or a number" if not row.answer else None
        reason = row.problem or missing
        if reason:
            left_out.append({"row": row.id, "reason": reason})
        else:
            kept.append((number, row))
    return kept, left_out


class Records:
    """The records on disk; one line each, appended as they come."""

    def __init__(self, folder: Path):
        self.path = Path(folder) / "records.jsonl"

    def read(self) -> dict[tuple[str, int], dict]:
        """Records by (strength key, row number); the last one counts. A line cut off by a kill is dropped.

        Raises ValueError where another line is broken.
        """
        if not self.path.exists():
            return {}
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            self.path.write_bytes(whole)
        found = {}
        for number, line in enumerate(whole.decode("utf-8").splitlines(), start=1):
            try:
                record = json.loads(line)
                found[record["key"], record["number"]] = record
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}, line {number}: {error!r}; remove the line to run it again") from None
        return found

    def append(self, task: Task, record: dict) -> None:
        """Writes one record before the next begins."""
        line = {"key": task.strength.key, "number": task.number, "id": task.row.id} | record
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")


def todo(points: Sequence[Strength], rows: Sequence[tuple[int, Row]], done: dict[tuple[str, int], dict]) -> list[Task]:
    """What is left to run: every point with every row that has no record, or only a problem."""
    return [
        Task(point, number, row)
        for point in points
        for number, row in rows
        if "problem" in done.get((point.key, number), {"problem": "not run"})
    ]


def sweep(
    points: Sequence[Strength],
    rows: Sequence[tuple[int, Row]],
    folder: Path,
    backend: Backend,
    strict: bool = False,
    progress: Progress = lambda records, _: records,
) -> dict[tuple[str, int], dict]:
    """Runs what `folder` does not hold yet and returns all records of these points and rows, by (key, number).

    With `strict` the first problem raises ValueError; its record is kept.
    """
    records = Records(folder)
    tasks = todo(points, rows, records.read())
    if tasks:
        for task, record in progress(backend(tasks), len(tasks)):
            records.append(task, record)
            if strict and "problem" in record:
                raise ValueError(f"row {task.row.id} at {task.strength.name}: {record['problem']}")
    found = records.read()
    wanted = [(point.key, number) for point in points for number, _ in rows]
    return {at: found[at] for at in wanted}
