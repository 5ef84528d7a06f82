"""The trainer of each training stage: its module, its config and the overrides that a recipe comes down to."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

ROOT = Path(__file__).resolve().parent.parent
TRAINED = ("coldstart", "coldstart_agto", "rl")
# The folder of the stage that leaves each evaluated checkpoint.
FOLDERS = {"coldstart": "coldstart", "coldstart_agto": "coldstart_agto", "avar": "rl"}


@dataclass(frozen=True)
class Trainer:
    """`python -m verl_avar.training.MODULE --config-name CONFIG OVERRIDES…`"""

    module: str  # sft or rl
    config: str
    overrides: list[str]

    def command(self, python: str) -> list[str]:
        return [python, "-m", f"verl_avar.training.{self.module}", "--config-name", self.config, *self.overrides]


def trainer(recipe: DictConfig, out: Path, stage: str, model: str) -> Trainer:
    """The trainer of a stage of TRAINED. model: folder or hub name that it starts from."""
    out = out.absolute()  # workers of a cluster have another working folder
    return _rl(recipe, out, model) if stage == "rl" else _sft(recipe, out, stage, model)


def start(stage: str) -> str:
    """The checkpoint that a training stage starts from: both cold starts from the base, GRPO from what AGTO left."""
    return "coldstart_agto" if stage == "rl" else "base"


def ray_address(recipe: DictConfig) -> str:
    """Address of the cluster that the trainers join, or "local" for a Ray of their own."""
    return recipe.ray_address or os.environ.get("RAY_ADDRESS") or "local"


def data_file(recipe: DictConfig, out: Path, kind: str) -> Path:
    """The parquet file of a kind: the user's own, or the one that the data stage writes."""
    return Path(recipe.data[kind]).expanduser().absolute() if recipe.data[kind] else out / "data" / f"{kind}.parquet"


def path_override(key: str, path: Path | str) -> str:
    """A hydra override whose value may hold any character that a path may."""
    text = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{text}'"


def _sft(recipe: DictConfig, out: Path, stage: str, model: str) -> Trainer:
    """SFT; with the attention-guided objective in `coldstart_agto`, the same but for it in `coldstart`."""
    settings, agto = recipe.coldstart, recipe.agto
    with_agto = stage == "coldstart_agto"
    floor = agto.system_floor if with_agto else None
    many = recipe.nodes * recipe.gpus_per_node > 1 or ray_address(recipe) != "local"
    overrides = [
        path_override("model.path", model),
        path_override("data.train_files", data_file(recipe, out, "sft")),
        path_override("trainer.default_local_dir", out / stage / "checkpoints"),
        f"trainer.seed={recipe.seed}",
        f"engine.avar.alpha={agto.alpha if with_agto else 0.0}",
        f"engine.avar.beta={agto.beta if with_agto else 0.0}",
        f"engine.avar.system_floor={'null' if floor is None else floor}",
        f"avar.ray={str(many and recipe.gpus_per_node > 0).lower()}",
        *_shared(recipe, settings, stage),
        *settings.overrides,
    ]
    return Trainer("sft", settings.config, overrides)


def _rl(recipe: DictConfig, out: Path, model: str) -> Trainer:
    """GRPO with VARS."""
    settings, reward = recipe.rl, recipe.vars
    key = "reward.custom_reward_function"
    overrides = [
        path_override("actor_rollout_ref.model.path", model),
        path_override("data.train_files", data_file(recipe, out, "rl")),
        path_override("data.val_files", data_file(recipe, out, "eval")),
        path_override("trainer.default_local_dir", out / "rl" / "checkpoints"),
        f"data.seed={recipe.seed}",
        path_override(f"{key}.path", ROOT / recipe.reward_fn),
        f"{key}.reward_kwargs.lambda_v={reward.lambda_v}",
        f"{key}.reward_kwargs.lambda_f={reward.lambda_f}",
        f"{key}.reward_kwargs.visual={reward.visual}",
        # What `evaluate`, transformers and vLLM load
        "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]",
        *_shared(recipe, settings, "rl"),
        *settings.overrides,
    ]
    return Trainer("rl", settings.config, overrides)


def _shared(recipe: DictConfig, settings: DictConfig, stage: str) -> list[str]:
    """Length of the training, machines, and names in the loggers."""
    if settings.steps is not None:
        length = [f"trainer.total_training_steps={settings.steps}"]
    else:  # verl counts the steps: its prompt filter may leave fewer rows than the file has
        length = [f"trainer.total_epochs={settings.epochs}", "trainer.total_training_steps=null"]
    machines = [path_override("ray_kwargs.ray_init.address", ray_address(recipe))]
    if recipe.gpus_per_node:
        machines += [f"trainer.nnodes={recipe.nodes}", f"trainer.n_gpus_per_node={recipe.gpus_per_node}"]
    for name, value in recipe.environment.items():  # of the workers on other nodes
        machines.append(path_override(f"+ray_kwargs.ray_init.runtime_env.env_vars.{name}", value))
    return [*length, *machines, path_override("trainer.experiment_name", f"{recipe.name}/{stage}")]
