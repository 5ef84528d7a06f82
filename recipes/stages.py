"""The stages of a run, each a function of (recipe, run folder, console) that can be called again where it stopped."""

from __future__ import annotations

import sys
from pathlib import Path

import evaluation
import pandas as pd
import pyarrow.parquet as pq
from cards import COUNTS, ENVIRONMENT, environment, on_hub, write_cards
from files import read_json, write_json
from omegaconf import DictConfig
from plan import total_steps
from preflight import check_suite
from rich.console import Console
from trainer_process import METRICS, run_trainer
from trainers import FOLDERS, data_file, start, trainer
from transformers.utils.logging import disable_progress_bar
from vard import write_vard

from verl_avar.data.published import named
from verl_avar.training.checkpoint import latest_model, latest_step
from verl_avar.training.compose import compose
from verl_avar.training.metrics import read_steps


def data(recipe: DictConfig, out: Path, console: Console) -> None:
    """Writes the parquet files that the recipe does not give: converts its sources, or the miniature's tasks.

    The miniature's cold start is made as anybody's is, by describing, reasoning and anchoring (`vard.py`).
    """
    from verl_avar.miniature import data as miniature
    from verl_avar.training.data import describe, write_rl, write_sft

    settings, seed = recipe.data, recipe.seed
    writers = {
        "sft": (write_sft, lambda path: write_vard(path, settings.sft_rows, seed, console)),
        "rl": (write_rl, lambda path: miniature.write_rl(path, settings.rl_rows, seed)),
        "eval": (write_rl, lambda path: miniature.write_eval(path, settings.eval_rows_per_task, seed)),
    }
    written = {}
    for kind, (convert, write) in writers.items():
        if settings[kind] is not None:
            continue
        path = data_file(recipe, out, kind)
        if sources := list(settings[f"{kind}_sources"]):
            counts = convert(path, sources, settings.system, settings.max_pixels)
            written[kind] = {"counts": counts, "hub": [source for source in sources if on_hub(named(source)[0])]}
            console.print(f"data: {path}: {describe(counts)}", highlight=False, markup=False, soft_wrap=True)
        else:
            write(path)
            rows = pq.read_metadata(path).num_rows
            written[kind] = {"counts": {"rows": rows}, "hub": []}
            console.print(f"data: {path} ({rows} rows)", highlight=False)
    if written:
        write_json(out / "data" / COUNTS, written)


def coldstart(recipe: DictConfig, out: Path, console: Console) -> None:
    """SFT without the attention-guided objective."""
    _sft(recipe, out, "coldstart", console)


def coldstart_agto(recipe: DictConfig, out: Path, console: Console) -> None:
    """The same SFT with it: same base, data, order and steps."""
    _sft(recipe, out, "coldstart_agto", console)


def _sft(recipe: DictConfig, out: Path, stage: str, console: Console) -> None:
    def describe(step: dict) -> str:
        vas = step.get("attention/vas_response")
        return f"loss {step.get('train/loss', float('nan')):.3f}" + (f"  VAS {vas:.2f}" if vas is not None else "")

    _train(recipe, out, stage, describe, console)


def rl(recipe: DictConfig, out: Path, console: Console) -> None:
    """GRPO with VARS from the checkpoint that AGTO left."""

    def describe(step: dict) -> str:
        return "  ".join(f"{k} {v:.3f}" for k, v in reward_parts(step).items() if v is not None and k != "step")

    _train(recipe, out, "rl", describe, console)


def _train(recipe: DictConfig, out: Path, stage: str, describe, console: Console) -> None:
    folder = out / stage
    training = trainer(recipe, out, stage, model_folder(recipe, out, start(stage)))
    steps = total_steps(recipe, out, stage, compose(training.config, training.overrides))
    if latest_step(folder / "checkpoints") >= steps:  # ended between its last checkpoint and being marked done
        return
    write_json(folder / ENVIRONMENT, environment(recipe))
    run_trainer(
        training.command(sys.executable), folder.absolute(), total_steps=steps, describe=describe, console=console
    )


def model_folder(recipe: DictConfig, out: Path, name: str) -> str:
    """Where the model of a stage lies, in Hugging Face format."""
    if name == "base":
        if recipe.base != "miniature":
            local = Path(recipe.base).expanduser()
            return str(local.absolute()) if local.exists() else recipe.base
        from verl_avar.miniature import base_path

        return str(base_path())
    return str(latest_model(out.absolute() / FOLDERS[name] / "checkpoints"))


def evaluate(recipe: DictConfig, out: Path, console: Console) -> None:
    """Greedy accuracy, shuffled control, VAS and masses of the base and of every trained stage."""
    disable_progress_bar()  # of loading weights: four models are loaded
    check_suite(recipe)
    models = {}
    for name in recipe.evaluation.checkpoints:
        if name == "base" or (out / FOLDERS[name] / "done.json").exists():
            models[name] = model_folder(recipe, out, name)
        else:
            console.print(f"evaluate: {name} has not been trained, left out")
    evaluation.evaluate(recipe, out, models, console)


def report(recipe: DictConfig, out: Path, console: Console) -> None:
    """results.json, figures, the page and the checkpoints' model cards, from what the other stages left."""
    from verl_avar.evaluation.checkpoint import load_checkpoint
    from verl_avar.evaluation.heatmap import heatmap_sample
    from verl_avar.report import print_table, render

    disable_progress_bar()
    results = collect(recipe, out)
    evaluated = [stage["name"] for stage in results["stages"]]
    rows = pd.read_parquet(data_file(recipe, out, "eval"))
    chosen = rows.iloc[:: max(1, len(rows) // max(1, recipe.evaluation.pictures))][: recipe.evaluation.pictures]
    samples = []
    for name in dict.fromkeys((evaluated[min(1, len(evaluated) - 1)], evaluated[-1])):
        checkpoint = load_checkpoint(model_folder(recipe, out, name), **evaluation.precision(recipe))
        samples += [
            heatmap_sample(checkpoint, row, recipe.evaluation.max_new_tokens, name) for _, row in chosen.iterrows()
        ]
    folder = out / "report"
    write_json(folder / "results.json", results)
    links = evaluation.pages(recipe, out, evaluated)
    page = render(results, out, samples, links)
    print_table(results, console)
    for written in (page, *(linked for _, linked in links)):
        console.print(f"report: {written}", highlight=False, soft_wrap=True)
    write_cards(recipe, out, results, console)


def collect(recipe: DictConfig, out: Path) -> dict:
    """`results.json` (its schema: verl_avar/report/results.py) from the stages' own files."""
    stages = []
    for stage in evaluation.evaluated(out):
        trained = out / FOLDERS.get(stage["name"], stage["name"]) / "done.json"
        # The time that the report shows is the training's.
        stages.append(stage | {"seconds": read_json(trained, {"seconds": 0.0})["seconds"]})
    steps = [reward_parts(step) for step in read_steps(out / "rl" / METRICS)]
    config = {"recipe": recipe.name, "seed": recipe.seed, "AGTO α, β": f"{recipe.agto.alpha}, {recipe.agto.beta}"}
    return {"stages": stages, "rl": [s for s in steps if s["reward"] is not None], "config": config}


def reward_parts(step: dict) -> dict:
    """The parts of the reward in verl's metrics of one RL step."""
    names = {
        "reward": "critic/score/mean",
        "acc": "reward/acc",
        "format": "reward/format",
        "visual": "reward/visual",
        "visual_raw": "reward/visual_raw",
        "visual_ratio": "reward/visual_ratio",
        "visual_mass": "reward/visual_mass",
        "system_mass": "reward/system_mass",
    }
    return {"step": step["step"]} | {part: step.get(name) for part, name in names.items()}
