"""What runs of both harnesses have in common: a proxy and a harness for each repeat, then rows of results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from verl_avar.calls.store import CALLS, Lines, locked
from verl_avar.evaluation.benchmark.harness.launch import HarnessFailed, environment, launch
from verl_avar.evaluation.benchmark.harness.proxy import Proxy, serving
from verl_avar.evaluation.benchmark.harness.reading import Rules, Verdict, agreement, result_rows, write_results
from verl_avar.evaluation.benchmark.harness.settings import HarnessSettings

MODEL = "avar"  # the harness's name of the model: some names make a harness change its requests
Command = Callable[[str, Path], tuple[list[str], dict[str, str]]]  # (proxy, raw folder) -> (command, more variables)
Read = Callable[[str, Path], dict[str, Verdict]]  # (benchmark, raw folder) -> verdicts by question id


def drive(
    name: str,
    scored_by: str,
    settings: HarnessSettings,
    questions: dict[str, Sequence[dict]],
    command: Command,
    read: Read,
    rules: Rules,
) -> Path:
    """Runs a harness once for each repeat; returns OUT/harness/NAME/results.parquet.

    Beside it: calls/ (whole responses, and what makes a rerun free), raw-N/ (the harness's own files of repeat N),
    harness.json (versions, counts, agreement). The log of all harnesses is OUT/harness/log.txt. Raises HarnessFailed
    where a benchmark has no prediction at all.
    """
    out, log = settings.out / "harness" / name, settings.out / "harness" / "log.txt"
    rows, counts = [], []
    with locked(out):
        for repeat in range(settings.repeats):
            raw = out / f"raw-{repeat}"
            if raw.exists():  # a harness would take up predictions of another protocol; our store has the answers
                shutil.rmtree(raw)
            raw.mkdir()
            proxy = Proxy(
                out, settings.server, settings.protocol, repeat, settings.judge, settings.timeout_s,
                settings.identity, settings.progress,
            )  # fmt: skip
            with serving(proxy) as address:
                words, variables = command(address, raw)
                launch(words, environment(settings, address) | variables, log, raw)
            counts.append(dict(proxy.counts))
            with Lines(out / CALLS) as stored:
                records = [stored.get(key) for key in proxy.answered]
            for benchmark, asked in questions.items():
                verdicts = read(benchmark, raw)
                if not verdicts:
                    raise HarnessFailed(f"{scored_by} wrote no prediction for {benchmark}: see the end of {log}")
                found = [verdicts.get(question["id"]) for question in asked]
                rows += result_rows(asked, found, records, scored_by, repeat, rules)
        path = write_results(out / "results.parquet", rows)
        about = {"harness": scored_by, "calls": counts, "agreement": agreement(rows)}
        about["judge"] = settings.judge.model if settings.judge else None
        scored = {row["benchmark"] for row in rows if row["scored_by"] == scored_by}
        asked_about = {question["benchmark"] for rows_of in questions.values() for question in rows_of}
        about["unscored"] = sorted(asked_about - scored)  # by the harness: its scorer failed, or wants a judge
        (out / "harness.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    return path
