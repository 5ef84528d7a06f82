"""VLMEvalKit from a checkout, on local TSV files, through its `--base-url` model and our proxy."""

from __future__ import annotations

import json
import os
import re
import shutil
import string
from pathlib import Path

from verl_avar.errors import ConfigError
from verl_avar.evaluation.benchmark.harness.driver import MODEL, drive
from verl_avar.evaluation.benchmark.harness.proxy import JUDGE_ROUTE
from verl_avar.evaluation.benchmark.harness.reading import Rules, Verdict
from verl_avar.evaluation.benchmark.harness.settings import (
    LONG_ANSWER,
    Benchmark,
    HarnessSettings,
    commit_of,
    harness_python,
)
from verl_avar.evaluation.benchmark.score import score

FAILED = "Failed to obtain answer via API."
OWN_PACKAGES = "vlmevalkit"  # folder of the environment with packages that lmms-eval cannot stand
RULES = "exact_matching"  # its name of scoring without a judge
LONG = 64  # a shorter image cell is the index of the row that holds the image
RIGHT = ("1", "1.0", "True")
# Files of single verdicts, by its kinds of scorers: (ending of the name, column of the verdict, of what was extracted).
VERDICTS = (("_{judge}_result.tsv", "hit", None), ("_auxmatch.tsv", "score", "extracted"))


def run(settings: HarnessSettings, rules: Rules = score) -> Path:
    """Drives VLMEvalKit over TSV files in its format; returns results.parquet (see driver.drive).

    Its rule-only mode scores choices and yes/no. Other classes need a judge: without one there are predictions and our
    own verdicts, and no verdicts of the harness. Raises ConfigError for a wrong setting, HarnessFailed where it fails.
    """
    python, source = harness_python(settings.python), checkout(settings.path)
    scored_by = f"vlmevalkit {version(source)} ({commit_of(source)})"
    questions = {one.name: one.questions or read_tsv(one) for one in settings.benchmarks}
    prefixes = {one.name: one.prefix for one in settings.benchmarks}

    def prepared(proxy: str, raw: Path) -> tuple[list[str], dict[str, str]]:
        data = raw / "LMUData"
        data.mkdir()
        for one in settings.benchmarks:
            # A copy: it downloads over a file whose MD5 sum is not the published one.
            shutil.copyfile(one.file, data / f"{one.name}.tsv")
        modules = [str(source), str(python.parents[1] / OWN_PACKAGES)]
        variables = {"LMUData": str(data), "PRED_FORMAT": "tsv", "PYTHONPATH": os.pathsep.join(modules)}
        return command(python, source, settings, proxy, raw), variables

    judge = settings.judge.model if settings.judge else RULES

    def verdicts(name: str, raw: Path) -> dict[str, Verdict]:
        found = read_predictions(name, raw, judge)
        return {prefixes[name] + index: verdict for index, verdict in found.items()}

    return drive("vlmevalkit", scored_by, settings, questions, prepared, verdicts, rules)


def command(python: Path, source: Path, settings: HarnessSettings, proxy: str, raw: Path) -> list[str]:
    """The harness's command line."""
    protocol, judge = settings.protocol, settings.judge
    words = [str(python), str(source / "run.py"), "--model", MODEL, "--base-url", f"{proxy}/v1", "--key", "none"]
    words += ["--data", *(one.name for one in settings.benchmarks), "--work-dir", str(raw / "predictions")]
    if kinds := {one.name: {"class": one.kind, "dataset": one.name} for one in settings.benchmarks if one.kind}:
        words += ["--data-config", json.dumps(kinds)]
    words += ["--api-nproc", str(settings.concurrency), "--retry", "3", "--timeout", str(int(settings.timeout_s))]
    words += ["--max-tokens", str(protocol.max_tokens or LONG_ANSWER), "--temperature", str(protocol.temperature)]
    words += ["--judge", judge.model if judge else RULES, "--judge-retry", "3"]
    return [*words, "--judge-base-url", f"{proxy}{JUDGE_ROUTE}", "--judge-key", "none"]


def checkout(path: Path | None) -> Path:
    """A folder with VLMEvalKit's source. Raises ConfigError."""
    how = "clone github.com/open-compass/VLMEvalKit and name it by --harness-path"
    if path is None:
        raise ConfigError(f"VLMEvalKit is on no package index: {how}")
    if not ((path / "run.py").is_file() and (path / "vlmeval" / "__init__.py").is_file()):
        raise ConfigError(f"{path} has no run.py and vlmeval/, as VLMEvalKit has: {how}")
    return path.absolute()


def version(source: Path) -> str:
    """Its __version__; the commit says more."""
    found = re.search(r"""__version__ = ['"](.+)['"]""", (source / "vlmeval" / "__init__.py").read_text())
    return found[1] if found else "unknown"


def read_tsv(benchmark: Benchmark) -> list[dict]:
    """Rows of schema.QUESTIONS of a TSV in VLMEvalKit's format. Raises ConfigError.

    Columns: index, question, answer; A, B, … for choices; image (base64, or the index of a row that has it, or a list
    of either). Of images that lie elsewhere (image_path) only the questions are read.
    """
    import base64

    file, name = benchmark.file, benchmark.name
    if not re.fullmatch(r"[\w.+-]+", name):
        raise ConfigError(f"benchmark {name!r}: VLMEvalKit makes a file name of it; use letters, digits and _.+-")
    if file is None or not file.is_file():
        raise ConfigError(f"benchmark {name}: VLMEvalKit is driven over a local TSV file; there is no {file}")
    lines = table(file)
    if missing := {"index", "question", "answer"} - set(lines[0] if lines else ()):
        raise ConfigError(f"benchmark {name}: {file} has no rows, or lacks the columns {', '.join(sorted(missing))}")
    cells = {line["index"]: line["image"] for line in lines} if "image" in lines[0] else {}

    def images(cell: str) -> list[dict]:
        cell = cells.get(cell, cell) if len(cell) <= LONG else cell
        parts = json.loads(cell.replace("'", '"')) if cell.startswith("[") else [cell]
        return [{"bytes": base64.b64decode(cells.get(part, part))} for part in parts if part]

    rows = []
    for row in lines:
        choices = [row[letter] for letter in string.ascii_uppercase if row.get(letter)]
        yes_no = row["answer"].strip().lower() in ("yes", "no")
        rows.append(
            {
                "benchmark": name,
                "id": row["index"],
                "question": row["question"],
                "choices": choices,
                "answer": row["answer"],
                "answer_type": "choice" if choices else "yes_no" if yes_no else "text",
                "images": images(cells[row["index"]]) if cells else None,
                "meta": json.dumps({key: row[key] for key in ("category", "split", "l2-category") if row.get(key)}),
            }
        )
    return rows


def read_predictions(name: str, raw: Path, judge: str = RULES) -> dict[str, Verdict]:
    """Verdicts by index; questions whose calls failed are left out. right is None where the harness did not score."""
    (path,) = [*(raw / "predictions").glob(f"{MODEL}/T*/{MODEL}_{name}.tsv")] or [None]
    if path is None:
        return {}
    scored: dict[str, tuple[bool, str | None]] = {}
    for ending, column, extracted in VERDICTS:
        file = path.with_name(f"{path.stem}{ending.format(judge=judge)}")
        for row in table(file) if file.is_file() else ():
            scored[row["index"]] = row[column] in RIGHT, row[extracted] if extracted else None
    found = {}
    for row in table(path):
        if FAILED not in row["prediction"]:
            found[row["index"]] = Verdict(row["prediction"], *scored.get(row["index"], (None, None)))
    return found


def table(file: Path) -> list[dict[str, str]]:
    """Rows of a TSV as texts; an empty cell is an empty text, and "None" or "NA" are what a model wrote."""
    import pandas as pd

    return pd.read_csv(file, sep="\t", dtype=str, keep_default_na=False).to_dict("records")
