"""What a recipe will do, found without doing it: every chosen trainer's whole configuration, steps, differences."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from settings import SettingsError
from trainers import FOLDERS, TRAINED, data_file, ray_address, start, trainer

from verl_avar.errors import ConfigError
from verl_avar.training.checks import engine_of
from verl_avar.training.compose import compose, verl_defaults

# verl's own configs, whose defaults ours are compared with, and what chooses its Megatron backend in them.
VERL = {"sft": "sft_trainer_engine", "rl": "ppo_trainer"}
VERL_MEGATRON = {"sft": ["engine=megatron", "optim=megatron"], "rl": ["model_engine=megatron"]}
# Shown above already.
SHOWN = ("model.path", "data.train_files", "data.val_files", "trainer.default_local_dir", "avar.metrics_file")


@dataclass(frozen=True)
class Composed:
    """A training stage's configuration, as its trainer will get it."""

    stage: str
    module: str  # sft or rl
    config: DictConfig


def compose_stages(recipe: DictConfig, out: Path, stages: list[str]) -> list[Composed]:
    """The configurations of the training stages among `stages`, checked against the installed verl.

    Raises SettingsError for an unknown key, and for a value that verl refuses.
    """
    from verl_avar.training.checks import check_objective
    from verl_avar.training.schema import check_rl, check_sft

    found = []
    for stage in [stage for stage in TRAINED if stage in stages]:
        training = trainer(recipe, out, stage, planned_model(recipe, out, start(stage)))
        try:
            config = compose(training.config, training.overrides)
            check_objective(config)
            (check_sft if training.module == "sft" else check_rl)(config)
        except ConfigError as error:
            raise SettingsError(f"{stage}: {error}") from None
        found.append(Composed(stage, training.module, config))
    return found


def planned_model(recipe: DictConfig, out: Path, name: str) -> str:
    """Where the model of a stage lies or will lie."""
    return recipe.base if name == "base" else str(out.absolute() / FOLDERS[name] / "checkpoints")


def rows(recipe: DictConfig, out: Path, kind: str) -> tuple[int, bool] | None:
    """Rows of a kind, and whether they were counted (else they are what the publishers say); None: not known yet."""
    import pyarrow.parquet as pq

    from verl_avar.training.data import PUBLISHED_ROWS

    path = data_file(recipe, out, kind)
    if path.is_file():
        return pq.read_metadata(path).num_rows, True
    sources = recipe.data[f"{kind}_sources"]
    if sources:
        sizes = [PUBLISHED_ROWS.get(source) for source in sources]
        return None if None in sizes else (sum(sizes), False)
    if recipe.data[kind] is not None or kind == "eval":
        return None
    return recipe.data[f"{kind}_rows"], True


def steps_per_epoch(recipe: DictConfig, out: Path, composed: Composed) -> int | None:
    """Whole batches of an epoch: verl drops the rest. None where the rows are not known yet."""
    known = rows(recipe, out, "rl" if composed.module == "rl" else "sft")
    return None if known is None else known[0] // composed.config.data.train_batch_size


def total_steps(recipe: DictConfig, out: Path, stage: str, config: DictConfig) -> int:
    """Steps of a training stage whose rows are there. RL may run fewer: verl leaves out overlong prompts.

    Raises SettingsError where the rows do not fill one batch.
    """
    settings = recipe.rl if stage == "rl" else recipe.coldstart
    if settings.steps is not None:
        return settings.steps
    kind = "rl" if stage == "rl" else "sft"
    steps = steps_per_epoch(recipe, out, Composed(stage, kind, config)) or 0
    if steps == 0:
        batch = config.data.train_batch_size
        raise SettingsError(f"{stage}: {data_file(recipe, out, kind)} has fewer rows than one batch ({batch})")
    return settings.epochs * steps


def differences(composed: Composed) -> list[tuple[str, Any, Any]]:
    """(key, value, verl's own value or None) of every effective setting that verl's defaults have otherwise."""
    megatron = engine_of(composed.config).strategy == "megatron"
    defaults = verl_defaults(VERL[composed.module], VERL_MEGATRON[composed.module] if megatron else [])
    ours = flat(OmegaConf.to_container(composed.config, resolve=True))
    theirs = flat(OmegaConf.to_container(defaults, resolve=True))
    unused = () if composed.module == "sft" else _unused(composed.config)
    return [
        (key, value, theirs.get(key))
        for key, value in ours.items()
        if (key not in theirs or theirs[key] != value) and not key.startswith(unused)
    ]


def _unused(config: DictConfig) -> tuple[str, ...]:
    """Parts of an RL configuration that this run builds nothing from; they follow others by interpolation."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy

    with warnings.catch_warnings():  # that GRPO has no critic
        warnings.simplefilter("ignore")
        critic = need_critic(config)
    parts = {
        "critic.": critic,
        "actor_rollout_ref.ref.": need_reference_policy(config),
        "distillation.": config.distillation.enabled,
    }
    return tuple(part for part, used in parts.items() if not used)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A tree of mappings as dotted keys and values."""
    if isinstance(tree, dict) and tree:
        parts = (flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in tree.items())
        return {key: value for part in parts for key, value in part.items()}
    return {prefix: tree}


def show(recipe: DictConfig, out: Path, stages: list[str], composed: list[Composed], console: Console) -> None:
    """Prints what a run of the stages would do."""

    def line(name: str, text: str) -> None:
        console.print(f"  {name:<12}{text}", highlight=False, soft_wrap=True, markup=False)

    console.print(f"{recipe.name}: nothing is started or written", highlight=False)
    line("stages", ", ".join(stages) or "none: all of them are done")
    line("model", "the miniature that ships with the package" if recipe.base == "miniature" else recipe.base)
    line("machines", _machines(recipe))
    for kind in ("sft", "rl", "eval"):
        line(f"data, {kind}", _data(recipe, out, kind))
    if {"evaluate", "report"} & {*stages}:
        line("evaluation", _evaluation(recipe))
    line("output", str(out.absolute()))
    for part in composed:
        settings = recipe.rl if part.module == "rl" else recipe.coldstart
        console.print(f"{part.stage} ({part.module}, config {settings.config})", highlight=False)
        line("from", planned_model(recipe, out, start(part.stage)))
        line("steps", _steps(recipe, out, part, settings))
        line("batch", _batch(part))
        line("settings", "that differ from verl's own (in brackets)")
        for key, value, default in differences(part):
            if not key.endswith(SHOWN):
                console.print(
                    f"    {key}={_text(value)}" + (f"  [{_text(default)}]" if default is not None else ""),
                    highlight=False, soft_wrap=True, markup=False,
                )  # fmt: skip


def _machines(recipe: DictConfig) -> str:
    size = f"{recipe.nodes} × {recipe.gpus_per_node} GPUs" if recipe.gpus_per_node else "no GPU"
    address = ray_address(recipe)
    return f"{size}, " + ("a Ray of its own" if address == "local" else f"Ray cluster {address}")


def _evaluation(recipe: DictConfig) -> str:
    settings = recipe.evaluation
    suite = "" if settings.suite is None else f", and {settings.suite} from {settings.data or 'the hub'}"
    served = " ".join(("avar serve", *settings.serve))
    return f"{', '.join(settings.checkpoints)} on the held-out rows{suite}; each on `{served}`"


def _data(recipe: DictConfig, out: Path, kind: str) -> str:
    sources = ", ".join(recipe.data[f"{kind}_sources"])
    origin = str(recipe.data[kind] or sources or "written from the miniature's tasks")
    known = rows(recipe, out, kind)
    if known is None:
        return origin
    return f"{origin} ({known[0]:,} rows{'' if known[1] else ' as published'})"


def _steps(recipe: DictConfig, out: Path, part: Composed, settings: DictConfig) -> str:
    if settings.steps is not None:
        return f"{settings.steps}"
    per_epoch = steps_per_epoch(recipe, out, part)
    if per_epoch is None:
        return f"{settings.epochs} epochs; how many steps is known when the data stage has written the rows"
    return f"{settings.epochs} epochs × {per_epoch} = {settings.epochs * per_epoch:,}"


def _batch(part: Composed) -> str:
    config = part.config
    if part.module == "sft":
        data, tensor = config.data, config.engine.get("tensor_model_parallel_size", 1)
        micro = f"{data.max_token_len_per_gpu} tokens" if data.use_dynamic_bsz else f"{data.micro_batch_size_per_gpu}"
        where = "a GPU" if tensor == 1 else f"{tensor} GPUs"
        return f"{data.train_batch_size} conversations of up to {data.max_length} tokens; {where} at once: {micro}"
    actor, n = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout.n
    return (
        f"{config.data.train_batch_size} prompts × {n} rollouts, up to {config.data.max_prompt_length} + "
        f"{config.data.max_response_length} tokens; an update: {actor.ppo_mini_batch_size} prompts"
    )


def _text(value: Any) -> str:
    return "null" if value is None else str(value)
