"""The stages of a run, each a function of (recipe, run folder, console) that can be called again where it stopped."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from files import read_json, write_json
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track
from trainer_process import METRICS, run_trainer
from transformers.utils.logging import disable_progress_bar

from verl_avar.training.checkpoint import latest_model, latest_step
from verl_avar.training.metrics import read_steps

ROOT = Path(__file__).resolve().parent.parent
# Names of the evaluated checkpoints, in the order of training.
CHECKPOINTS = ("base", "coldstart", "coldstart_agto", "avar")
FOLDERS = {"coldstart": "coldstart", "coldstart_agto": "coldstart_agto", "avar": "rl"}


def data(recipe: DictConfig, out: Path, console: Console) -> None:
    """Writes the parquet files that the recipe does not give."""
    from verl_avar.miniature import data as miniature

    settings, seed = recipe.data, recipe.seed
    writers = {
        "sft": lambda path: miniature.write_sft(path, settings.sft_rows, seed),
        "rl": lambda path: miniature.write_rl(path, settings.rl_rows, seed),
        "eval": lambda path: miniature.write_eval(path, settings.eval_rows_per_task, seed),
    }
    for kind, write in writers.items():
        if settings[kind] is None:
            path = data_file(recipe, out, kind)
            write(path)
            console.print(f"data: {path} ({len(pd.read_parquet(path))} rows)", highlight=False)


def data_file(recipe: DictConfig, out: Path, kind: str) -> Path:
    """The parquet file of a kind: the user's own, or the one that the data stage wrote."""
    return Path(recipe.data[kind]).expanduser() if recipe.data[kind] else out / "data" / f"{kind}.parquet"


def path_override(key: str, path: Path | str) -> str:
    """A hydra override whose value may hold any character that a path may."""
    text = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{text}'"


def coldstart(recipe: DictConfig, out: Path, console: Console) -> None:
    """SFT without the attention-guided objective."""
    _sft(recipe, out, "coldstart", alpha=0.0, beta=0.0, floor=None, console=console)


def coldstart_agto(recipe: DictConfig, out: Path, console: Console) -> None:
    """The same SFT with it: same base, data, order and steps."""
    agto = recipe.agto
    _sft(recipe, out, "coldstart_agto", alpha=agto.alpha, beta=agto.beta, floor=agto.system_floor, console=console)


def _sft(recipe: DictConfig, out: Path, stage: str, *, alpha, beta, floor, console: Console) -> None:
    settings = recipe.coldstart
    overrides = [
        path_override("model.path", model_folder(recipe, out, "base")),
        path_override("data.train_files", data_file(recipe, out, "sft")),
        path_override("trainer.default_local_dir", out / stage / "checkpoints"),
        f"trainer.total_training_steps={settings.steps}",
        f"trainer.seed={recipe.seed}",
        f"engine.avar.alpha={alpha}",
        f"engine.avar.beta={beta}",
        f"engine.avar.system_floor={'null' if floor is None else floor}",
        *settings.overrides,
    ]

    def describe(step: dict) -> str:
        vas = step.get("attention/vas_response")
        return f"loss {step.get('train/loss', float('nan')):.3f}" + (f"  VAS {vas:.2f}" if vas is not None else "")

    _train("sft", settings, overrides, out / stage, describe, console)


def rl(recipe: DictConfig, out: Path, console: Console) -> None:
    """GRPO with VARS from the checkpoint that AGTO left."""
    settings = recipe.rl
    overrides = [
        path_override("actor_rollout_ref.model.path", model_folder(recipe, out, "coldstart_agto")),
        path_override("data.train_files", data_file(recipe, out, "rl")),
        path_override("data.val_files", data_file(recipe, out, "eval")),
        path_override("trainer.default_local_dir", out / "rl" / "checkpoints"),
        f"trainer.total_training_steps={settings.steps}",
        f"data.seed={recipe.seed}",
        path_override("reward.custom_reward_function.path", ROOT / recipe.reward_fn),
        *settings.overrides,
    ]

    def describe(step: dict) -> str:
        return "  ".join(f"{k} {v:.3f}" for k, v in reward_parts(step).items() if v is not None and k != "step")

    _train("rl", settings, overrides, out / "rl", describe, console)


def _train(module: str, settings, overrides: list[str], folder: Path, describe, console: Console) -> None:
    if latest_step(folder / "checkpoints") >= settings.steps:  # ended between its last checkpoint and being marked done
        return
    run_trainer(
        [sys.executable, "-m", f"verl_avar.training.{module}", "--config-name", settings.config, *overrides],
        folder.absolute(),
        total_steps=settings.steps,
        describe=describe,
        console=console,
    )


def model_folder(recipe: DictConfig, out: Path, name: str) -> str:
    """Where the model of a stage lies, in Hugging Face format."""
    if name == "base":
        if recipe.base != "miniature":
            local = Path(recipe.base).expanduser()
            return str(local) if local.exists() else recipe.base
        from verl_avar.miniature import base_path

        return str(base_path())
    return str(latest_model(out / FOLDERS[name] / "checkpoints"))


def evaluate(recipe: DictConfig, out: Path, console: Console) -> None:
    """Greedy accuracy, shuffled control, VAS and masses of the base and of every trained stage."""
    from verl_avar.evaluation.evaluate import evaluate as evaluate_checkpoint

    disable_progress_bar()  # of loading weights: four models are loaded
    rows = pd.read_parquet(data_file(recipe, out, "eval"))
    compute_score = reward_function(ROOT / recipe.reward_fn)

    def score(row: dict, text: str) -> float:
        truth = row["reward_model"]["ground_truth"]
        return compute_score(row["data_source"], text, truth, {}, lambda_v=0.0, on_missing="zero")["acc"]

    def progress(steps: Iterable, label: str) -> Iterable:
        return track(steps, description=f"evaluate: {name}, {label}", console=console)

    for name in CHECKPOINTS:
        done = out / "evaluate" / f"{name}.json"
        if done.exists():
            continue
        if name != "base" and not (out / FOLDERS[name] / "done.json").exists():
            console.print(f"evaluate: {name} has not been trained, left out")
            continue
        results = evaluate_checkpoint(
            model_folder(recipe, out, name), rows, score,
            max_new_tokens=recipe.evaluation.max_new_tokens, batch_size=recipe.evaluation.batch_size,
            seed=recipe.seed, progress=progress,
        )  # fmt: skip
        answers = rows[["extra_info", "reward_model"]].assign(response=results.pop("responses"))
        answers.to_parquet(done.with_suffix(".parquet"))
        write_json(done, {"name": name, "samples": len(rows)} | results)
        console.print(f"evaluate: {name}: accuracy {results['accuracy']['all']:.3f}", highlight=False)


def report(recipe: DictConfig, out: Path, console: Console) -> None:
    """results.json, figures and the page, from what the other stages left."""
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
        checkpoint = load_checkpoint(model_folder(recipe, out, name))
        samples += [
            heatmap_sample(checkpoint, row, recipe.evaluation.max_new_tokens, name) for _, row in chosen.iterrows()
        ]
    folder = out / "report"
    write_json(folder / "results.json", results)
    page = render(results, out, samples)
    print_table(results, console)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)


def collect(recipe: DictConfig, out: Path) -> dict:
    """`results.json` (its schema: verl_avar/report/results.py) from the stages' own files."""
    stages = []
    for name in CHECKPOINTS:
        path = out / "evaluate" / f"{name}.json"
        if not path.exists():
            continue
        stage = read_json(path)
        trained = out / FOLDERS.get(name, name) / "done.json"
        # The time that the report shows is the training's; that of evaluating is beside it.
        stage["evaluation_seconds"] = stage["seconds"]
        stage["seconds"] = read_json(trained, {"seconds": 0.0})["seconds"]
        stages.append(stage)
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


def reward_function(path: Path):
    """`compute_score` of a file of reward_fns/, loaded as verl does."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.compute_score
