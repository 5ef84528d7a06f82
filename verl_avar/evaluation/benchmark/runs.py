"""What a run left behind: a model's answers to a suite, with the settings that they were made under."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from verl_avar.errors import ConfigError
from verl_avar.evaluation.benchmark.schema import PLAIN, RESULTS

if TYPE_CHECKING:
    import pandas as pd

# What tables and figures need; prompts and responses are long, and are read by whoever shows them.
LONG = ("prompt", "response")
COLUMNS = [name for name in RESULTS.names if name not in LONG]
# Settings that two runs must share for their figures to be comparable.
PROTOCOL = ("suite", "protocol", "harness", "sampling", "seed", "repeats", "scored_by")


@dataclass(frozen=True)
class Run:
    """One model folder: its summary, and results (schema.RESULTS as a table, without prompts).

    Of `response` only whether there is one is kept: "" or None.
    """

    folder: Path
    name: str
    summary: Mapping
    results: pd.DataFrame

    @property
    def titles(self) -> dict[str, str]:
        """The suite's benchmarks in their order, as a reader sees them."""
        return {name: about.get("title") or name for name, about in self.summary["benchmarks"].items()}

    @property
    def metrics(self) -> dict[str, str]:
        """The suite's benchmarks with the names of their metrics."""
        return {name: about.get("metric") or "accuracy" for name, about in self.summary["benchmarks"].items()}

    def of(self, condition: str = PLAIN) -> pd.DataFrame:
        """The results under one condition."""
        return self.results[self.results["condition"] == condition]


def read_run(folder: Path | str) -> Run:
    """A model folder's run. Raises ConfigError where a file is missing or not as its schema says."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = Path(folder)
    for file in ("summary.json", "results.parquet"):
        if not (folder / file).is_file():
            raise ConfigError(f"{folder} has no {file}: name a model's folder of an avar eval run")
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        table = pq.read_table(folder / "results.parquet", columns=COLUMNS)
    except (json.JSONDecodeError, pa.ArrowInvalid) as error:
        raise ConfigError(f"{folder}: {error}; run avar eval again, it goes on from the stored answers") from None
    if absent := {"name", "benchmarks"} - summary.keys():
        raise ConfigError(f"{folder / 'summary.json'} lacks {', '.join(sorted(absent))}: not of avar eval")
    if absent := set(COLUMNS) - set(table.column_names):
        raise ConfigError(f"{folder / 'results.parquet'} lacks {', '.join(sorted(absent))}: of another version")
    results = table.to_pandas()
    results["response"] = results["right"].map(lambda right: None if right is None else "")  # null as `right` is
    return Run(folder, " ".join(str(summary["name"]).split()), summary, results)


def read_runs(folders: Sequence[Path | str]) -> list[Run]:
    """Runs to set side by side. Raises ConfigError for none, and for two of one name."""
    if not folders:
        raise ConfigError("no model folder given: name at least one, such as runs/eval/MODEL")
    runs = [read_run(folder) for folder in folders]
    for index, run in enumerate(runs):
        if run.name in {other.name for other in runs[:index]}:
            raise ConfigError(f"two runs are named '{run.name}': give one of them another name (avar eval --name)")
    return runs


def all_titles(runs: Sequence[Run]) -> dict[str, str]:
    """The benchmarks of all runs, in the order of the first that has each."""
    found: dict[str, str] = {}
    for run in runs:
        found |= {name: title for name, title in run.titles.items() if name not in found}
    return found


def protocol_differences(runs: Sequence[Run]) -> list[str]:
    """Settings in which a run departs from the first, as lines for the reader."""
    first, *others = runs
    lines = []
    for run in others:
        for key in PROTOCOL:
            old, new = (one.summary.get(key) for one in (first, run))
            if old != new:
                lines.append(f"{run.name} was run with {key} {_said(new)}, {first.name} with {_said(old)}.")
    return lines


def _said(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    return text if len(text) <= 120 else text[:117] + "…"
