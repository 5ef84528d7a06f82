"""The evaluation of a run's checkpoints by the code of `avar eval`, and where they look in their answers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import torch
from files import read_json, write_json
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track
from settings import CHECKPOINTS
from trainer_process import StageFailed
from trainers import data_file

from verl_avar.calls.endpoint import EndpointError
from verl_avar.evaluation.benchmark.definition import Benchmark, Layout, Part, load_suite
from verl_avar.evaluation.benchmark.predict import RESULTS_FILE
from verl_avar.evaluation.benchmark.run import Model, Plan
from verl_avar.evaluation.benchmark.run import run as run_model
from verl_avar.evaluation.benchmark.schema import PLAIN

SHUFFLED = "other_image"
FIGURES = "figures.json"  # in a checkpoint's folder: what `results.json` says of it
SUITE = "suite"  # folder of the benchmarks that the recipe names, beside those of the held-out rows


def held_out(path: Path) -> Benchmark:
    """verl's RL rows in a file as a benchmark: asked with their own turns, as training asks them.

    Any answer is judged as text, which compares letters, numbers and LaTeX by value too; one that is just a number is
    looked for in what a sentence says. The category is the row's task.
    """
    return Benchmark(
        name="held_out",
        title="Held-out rows",
        metric="accuracy",
        licence="the rows' own",
        sources=(str(path.name),),
        parts=(Part("eval", questions=pq.read_metadata(path).num_rows),),
        layouts=(
            Layout(
                needs=("prompt", "images", "reward_model"),
                id=("extra_info.index", "extra_info.id", "id"),
                question="prompt",
                turns=True,
                answer=("reward_model.ground_truth",),
                images=("images",),
                meta={"category": "extra_info.task"},
            ),
        ),
        open_type="text",
        plain_numbers=True,
        protocol="own",
    )


def plan(recipe: DictConfig, out: Path) -> Plan:
    """What every checkpoint is asked of the recipe's own held-out rows."""
    path = data_file(recipe, out, "eval")
    settings = recipe.evaluation
    return Plan(
        suite="held-out rows",
        benchmarks=[held_out(path)],
        out=out / "evaluate",
        data=path,
        conditions=(PLAIN, SHUFFLED),
        # Greedy means greedy: some checkpoints ship a repetition penalty.
        sampling={"temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": settings.max_new_tokens},
        concurrency=settings.batch_size,
        serve=list(settings.serve),
    )


def suite_plan(recipe: DictConfig, out: Path) -> Plan | None:
    """What it is asked of the benchmarks that the recipe names, if any: plainly, for they are many."""
    settings = recipe.evaluation
    if settings.suite is None:
        return None
    return replace(
        plan(recipe, out),
        suite=Path(settings.suite).stem,
        benchmarks=load_suite(settings.suite),
        out=out / "evaluate" / SUITE,
        data=Path(settings.data).expanduser() if settings.data else None,
        conditions=(PLAIN,),
    )


def evaluate(recipe: DictConfig, out: Path, checkpoints: dict[str, str], console: Console) -> None:
    """Asks each checkpoint what it has no answer to yet, and measures its answers.

    checkpoints: name -> folder of the model, or hub name. Raises StageFailed where answers are missing.
    """
    plans = [one for one in (plan(recipe, out), suite_plan(recipe, out)) if one is not None]
    for name, model in checkpoints.items():
        try:
            folders = [run_model(one, Model(model, name), console) for one in plans]
        except EndpointError as error:
            raise StageFailed(f"evaluate: {name}: {error}") from None
        for folder in folders:
            check_answers(folder, name, console)
        found = measure(recipe, folders[0], name, model, console)
        write_json(folders[0] / FIGURES, found)
        console.print(f"evaluate: {name}: accuracy {found['accuracy']['all']:.3f}", highlight=False)


def check_answers(folder: Path, name: str, console: Console) -> None:
    """Says how many requests the server refused, which count as wrong. Raises StageFailed where others have no answer:
    they are asked again."""
    failed = pq.read_table(folder / RESULTS_FILE, columns=["finish"], filters=[("problem", "=", "failed")]).to_pylist()
    refused = [one["finish"] for one in failed if one["finish"]]
    if len(failed) > len(refused):
        raise StageFailed(f"evaluate: {name}: {len(failed) - len(refused)} answers did not come; see {folder}/failures")
    if refused:
        said = f"evaluate: {name}: the server refused {len(refused)} requests, counted as wrong: {refused[0][:200]}"
        console.print(said, highlight=False, markup=False, soft_wrap=True)


def measure(recipe: DictConfig, folder: Path, name: str, model: str, console: Console) -> dict:
    """What `results.json` says of a checkpoint, but its training's time."""
    from verl_avar.evaluation.evaluate import look

    def progress(batches: Iterable) -> Iterable:
        return track(batches, description=f"evaluate: {name}, attention", console=console)

    seen = look(folder, model, batch_size=recipe.evaluation.batch_size, progress=progress, **precision(recipe))
    for one in seen["unmeasured"][:3]:
        said = f"evaluate: {name}: no attention measured of row {one['row']}: {one['reason']}"
        console.print(said, highlight=False, markup=False, soft_wrap=True)
    columns = ["id", "condition", "meta", "right"]
    results = pq.read_table(folder / RESULTS_FILE, columns=columns).to_pandas()
    return {
        "name": name,
        "samples": int((results["condition"] == PLAIN).sum()),
        "accuracy": by_task(results, PLAIN),
        "shuffled": by_task(results, SHUFFLED),
        **{key: seen[key] for key in ("vas", "mass", "dtype", "measured")},
    }


def by_task(results: pd.DataFrame, condition: str) -> dict[str, float]:
    """Shares of right answers under a condition: of all rows, and of each category; what did not come is wrong."""
    rows = results[results["condition"] == condition]
    right = rows["right"].eq(True)
    tasks = rows["meta"].map(lambda meta: json.loads(meta).get("category"))
    return {"all": float(right.mean())} | {
        str(task): float(share) for task, share in right.groupby(tasks, sort=False).mean().items()
    }


def precision(recipe: DictConfig) -> dict:
    """Where and how a checkpoint is measured: on the first GPU in its own dtype, or on the CPU in float32."""
    return {"device": "cuda", "dtype": "auto"} if recipe.gpus_per_node else {"device": "cpu", "dtype": torch.float32}


def evaluated(out: Path) -> list[dict]:
    """The figures of the checkpoints that were evaluated, in the order of training."""
    found = [read_json(out / "evaluate" / name / FIGURES) for name in CHECKPOINTS]
    return [figures for figures in found if figures is not None]


def pages(recipe: DictConfig, out: Path, names: list[str]) -> list[tuple[str, Path]]:
    """Writes the pages of `avar eval`, the base first, with tables beside; (title, page) of each."""
    from verl_avar.evaluation.benchmark.runs import read_runs
    from verl_avar.report.eval_page import render_eval

    places = [("The held-out rows, with controls, tables and tests", out / "evaluate", out / "report" / "evaluation")]
    if recipe.evaluation.suite is not None:
        title = f"The benchmarks of {Path(recipe.evaluation.suite).stem}"
        places.append((title, out / "evaluate" / SUITE, out / "report" / SUITE))
    return [(title, render_eval(read_runs([source / name for name in names]), page)) for title, source, page in places]
