"""One model on a suite, asked and scored by a harness; the model's folder is as `benchmark.run` leaves it.

results.parquet has one row a question: the harness's verdict where it gave one, else that of our rules (`scored_by`
says which). Both verdicts of each question are in harness/NAME/results.parquet.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from verl_avar.calls.store import locked, write_whole
from verl_avar.errors import ConfigError
from verl_avar.evaluation.benchmark.copies import find_copy
from verl_avar.evaluation.benchmark.definition import Benchmark as Definition
from verl_avar.evaluation.benchmark.harness import lmms_eval, vlmevalkit
from verl_avar.evaluation.benchmark.harness.reading import agreement, write_results
from verl_avar.evaluation.benchmark.harness.settings import Benchmark, Endpoint, HarnessSettings, Protocol
from verl_avar.evaluation.benchmark.judge import RULES
from verl_avar.evaluation.benchmark.predict import RESULTS_FILE, TAGGED, read_questions
from verl_avar.evaluation.benchmark.prompts import protocol
from verl_avar.evaluation.benchmark.run import SUMMARY_FILE, Model, Plan, bar, folder_name, questions, summary
from verl_avar.evaluation.benchmark.schema import PLAIN, QUESTIONS
from verl_avar.evaluation.benchmark.score import score
from verl_avar.evaluation.benchmark.server import served
from verl_avar.evaluation.partial import fingerprint

HARNESSES = ("vlmevalkit", "lmms-eval")
UNCHANGED = "harness"  # the protocol that leaves a harness's words alone


@dataclass(frozen=True)
class Harness:
    """name: of HARNESSES. path: VLMEvalKit's checkout. python: interpreter of the harnesses' environment."""

    name: str
    path: Path | None = None
    python: Path | None = None


def run(plan: Plan, model: Model, harness: Harness, console: Console) -> Path:
    """Asks what is missing and has all of it scored; returns the model's folder.

    Raises ConfigError for what a harness can't be asked, HarnessFailed where it ends without predictions.
    """
    how = check(plan, harness)
    by_index = harness.name == "vlmevalkit"
    plan = replace(plan, benchmarks=[indexed(one) for one in plan.benchmarks]) if by_index else plan
    folder = plan.out / folder_name(model.name)
    sent = model.served_name or (model.name if model.url is None else model.path)
    with locked(folder):
        count, broken = questions(plan, folder)
        console.print(f"{model.name}: {count:,} questions, by {harness.name}", highlight=False)
        benchmarks = tuple(tables(plan, folder) if by_index else files(plan, folder))
        server = nullcontext(model.url) if model.url else served(model.path, sent, folder / "server.txt", plan.serve)
        with server as url, bar(model.name, count * plan.repeats, console) as advance:
            settings = HarnessSettings(
                out=folder,
                server=Endpoint(url, sent, model.api_key_env),
                benchmarks=benchmarks,
                protocol=how,
                judge=plan.judge and Endpoint(plan.judge.base_url, plan.judge.model, plan.judge.api_key_env),
                path=harness.path,
                python=harness.python,
                concurrency=plan.concurrency,
                timeout_s=plan.timeout_s,
                repeats=plan.repeats,
                identity=fingerprint(model.path),
                progress=advance,
            )
            rules = functools.partial(score, tagged=name_of(plan) in TAGGED)
            both = (vlmevalkit if by_index else lmms_eval).run(settings, rules)
        about = summary(plan, model, count, broken) | collect(both, folder)
        write_whole(folder / SUMMARY_FILE, json.dumps(about, indent=1, ensure_ascii=False))
    for line in about["agreement"]:
        console.print(f"{model.name}: {line}", highlight=False)
    if failed := about["failed"]:
        console.print(f"{model.name}: {failed} answers did not come; the same command asks again", highlight=False)
    return folder


def check(plan: Plan, harness: Harness) -> Protocol:
    """What the proxy makes of the harness's requests. Raises ConfigError for what it can't."""
    if set(plan.conditions) != {PLAIN}:
        raise ConfigError("controls and biases are the native runner's: leave out --harness, or run them beside it")
    if harness.name == "vlmevalkit" and plan.limit is not None:
        raise ConfigError("--limit: VLMEvalKit reads its files whole; give it shorter ones")
    if harness.name == "lmms-eval" and plan.judge is not None:
        raise ConfigError("--judge: lmms-eval scores local files by its rules; a judge is for VLMEvalKit or without")
    name = name_of(plan)
    if name == "direct":
        raise ConfigError("--protocol direct has words of its own; with --harness there are think and harness")
    extra = {"vllm_xargs": {"attention_scores": plan.attention}} if plan.attention != "off" else {}
    sampling = dict(plan.sampling)
    return Protocol(
        system=None if name == UNCHANGED else protocol(name).system,
        max_tokens=sampling.pop("max_tokens", None),
        temperature=sampling.pop("temperature", 0.0),
        top_p=sampling.pop("top_p", 1.0),
        seed=plan.seed,
        extra=sampling | extra,
    )


def name_of(plan: Plan) -> str:
    """The one protocol of a plan. Raises ConfigError where its benchmarks have several."""
    names = {plan.protocol or benchmark.protocol for benchmark in plan.benchmarks}
    if len(names) > 1:
        raise ConfigError(f"a harness is run under one protocol, these benchmarks have {', '.join(sorted(names))}: "
                          "name one by --protocol")  # fmt: skip
    return names.pop()


def indexed(definition: Definition) -> Definition:
    """With VLMEvalKit's own ids, for what it calls a question is known by these alone."""
    layouts = [replace(one, id=("index",)) for one in definition.layouts if "index" in one.needs]
    if not layouts:
        raise ConfigError(f"{definition.name}: its definition knows no TSV file of VLMEvalKit's; use lmms-eval")
    return replace(definition, layouts=tuple(layouts))


def tables(plan: Plan, folder: Path) -> Iterable[Benchmark]:
    """The TSV files of the benchmarks' parts, for VLMEvalKit."""
    if plan.data is None:
        raise ConfigError("--data: VLMEvalKit is driven over local TSV files: name the folder that has them")
    for definition, found in _asked(plan, folder):
        for part in definition.parts:
            file = find_copy(definition, part, plan.data)
            if file is None or file.suffix != ".tsv":
                raise ConfigError(f"{definition.name}: VLMEvalKit wants {part.tsv or 'a TSV file'} in {plan.data}")
            prefix = f"{part.name}/" if len(definition.parts) > 1 else ""
            kind = None if file.name == part.tsv else part.vlmevalkit
            if file.name != part.tsv and kind is None:
                how = f"call it {part.tsv}" if part.tsv else "name one by `vlmevalkit:` in the definition's parts"
                raise ConfigError(f"{file}: VLMEvalKit has no class for {definition.name} in a file so called: {how}")
            rows = [question for question in found if question["id"].startswith(prefix)]
            yield Benchmark(file.stem, file, kind, rows, prefix)


def files(plan: Plan, folder: Path) -> Iterable[Benchmark]:
    """A Parquet file of schema.QUESTIONS for each benchmark, for lmms-eval."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = folder / "harness" / "questions"
    place.mkdir(parents=True, exist_ok=True)
    for definition, found in _asked(plan, folder):
        path = place / f"{definition.name}.parquet"
        pq.write_table(pa.Table.from_pylist(found, QUESTIONS), path)
        yield Benchmark(f"avar_{definition.name}", path, questions=found)  # lmms-eval has tasks of the same names


def _asked(plan: Plan, folder: Path) -> Iterable[tuple[Definition, list[dict]]]:
    """Each benchmark with its questions, which lie one benchmark after another."""
    definitions = {definition.name: definition for definition in plan.benchmarks}
    for name, rows in itertools.groupby(read_questions(folder), key=lambda question: question["benchmark"]):
        yield definitions[name], list(rows)


def collect(both: Path, folder: Path) -> dict:
    """Writes FOLDER/results.parquet of a harness's; returns what summary.json says of the scoring."""
    import pyarrow.parquet as pq

    rows = pq.read_table(both).to_pylist()
    about = json.loads(both.with_name("harness.json").read_text(encoding="utf-8"))
    kept = chosen(rows)
    write_results(folder / RESULTS_FILE, kept)
    by_benchmark = defaultdict(set)
    for row in kept:
        by_benchmark[row["benchmark"]].add(row["scored_by"])
    return {
        "harness": about["harness"],
        "judge": about["judge"],
        "scored_by": {name: " and ".join(sorted(by)) for name, by in by_benchmark.items()},
        "agreement": [
            f"{one['benchmark']}: of {one['scored']} answers {one['theirs']} are right by {one['harness']}, "
            f"{one['rules']} by our rules; they differ on {len(one['disagree'])}"
            for one in agreement(rows)
        ],
        "failed": sum(row["problem"] == "failed" for row in kept),
    }


def chosen(rows: Sequence[dict]) -> list[dict]:
    """One row a question and repeat, the harness's where there is one, in their order."""
    found: dict[tuple, dict] = {}
    for row in rows:
        key = row["benchmark"], row["id"], row["repeat"]
        if key not in found or row["scored_by"] != RULES:
            found[key] = row
    return list(found.values())
