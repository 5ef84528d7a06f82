"""`avar synth run` against an endpoint that limits its rate and fails in every way, with and without kill -9.

    python tests/benchmarks/synthesis.py [--rows 5000] [--requests-per-minute 6000] [--few 1000] [--kills 3] [--seed 0]

Rows of the miniature go through describe, reason and anchor, by the exact teacher's endpoint (`verl_avar.miniature`):
rules, not models, served over HTTP. Of its requests 5 % each are refused as too many (429), fail (500), are held until
the client gives up, are cut off in the middle, or answered with broken JSON; of its texts 5 % each have a wrong answer,
a leak, or are a refusal, where the stage can have them. The endpoint refuses requests above the stated rate, which the
config names as well. Client and endpoint are two processes on one machine.

`--few` rows for what memory they take; then `--rows` once through; then these in another folder with kill -9 at random
moments and reruns. What must hold: every row exactly once, accepted, or rejected for the fault that its text has; the
same rows and texts after kills; nothing paid twice but what was in flight at a kill; at least 90 % of the stated rate
used; peak memory of `--rows` within 10 % of that of `--few`. Exit status 1 where something does not.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table
from synthesis_runs import FAULTS, HOLD_S, compare, run, settings, write_config

from verl_avar.miniature.data import write_questions
from verl_avar.miniature.teacher_server import Teacher

WANTED_SHARE, WANTED_GROWTH = 0.90, 1.10


def peak_of(folder: Path, rows: int, per_minute: float, seed: int) -> tuple[float, list[str]]:
    """Peak memory in MB of a run of that many rows."""
    questions = write_questions(folder / "few.parquet", rows, seed)
    with Teacher(FAULTS, requests_per_minute=per_minute, hold_s=HOLD_S, seed=seed) as server:
        given = settings(folder / "few", questions, server.url, requests_per_minute=per_minute)
        ended = run(write_config(folder / "few.yaml", given))
    return ended.peak_mb, [f"the run of {rows} rows ended with {ended.code}: {ended.errors}"] if ended.code else []


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--few", type=int, default=1000, help="rows of the run that memory is compared with")
    parser.add_argument("--requests-per-minute", type=float, default=6000.0, metavar="R")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the rows, the faults and the moments of kills")
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder, rate = Path(name), given.requests_per_minute
        few_mb, failures = peak_of(folder, given.few, rate, given.seed)
        seen = compare(folder, given.rows, rate, given.kills, given.seed, WANTED_SHARE)
    growth = seen.peak_mb / few_mb
    failures += seen.failures
    if growth > WANTED_GROWTH:
        failures.append(f"peak memory of {given.rows} rows is {growth:.2f} times that of {given.few}")
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in seen.reasons.items())
    table = Table("", "")
    for line in (
        ("rows", f"{seen.rows:,}"),
        ("accepted", f"{seen.accepted:,}"),
        ("rejected", f"{seen.rejected:,} ({reasons})"),
        ("answered calls", f"{seen.calls:,}"),
        ("requests", f"{seen.requests:,} in {seen.seconds:.0f} s, start and outputs included"),
        ("stated rate", f"{rate:,.0f} requests a minute; {seen.limited:,} refused as above it"),
        ("of it used", f"{seen.share:.1%} by the endpoint's clock, {seen.own_share:.1%} by summary.json"),
        ("kill -9", f"{seen.kills}; calls answered twice: {seen.twice}, in flight at a kill"),
        ("rows that differ after kills", f"{seen.different:,}"),
        (f"peak memory, {given.few:,} rows", f"{few_mb:.0f} MB"),
        (f"peak memory, {given.rows:,} rows", f"{seen.peak_mb:.0f} MB, {growth:.3f} times as much"),
    ):
        table.add_row(*line)
    console = Console()
    console.print(table)
    for failure in failures:
        console.print(f"FAILED: {failure}", markup=False, soft_wrap=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
