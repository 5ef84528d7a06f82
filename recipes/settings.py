"""A recipe's settings: a yaml checked against these dataclasses, with `key=value` overrides on top."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl_avar.data.schema import MAX_PIXELS, SYSTEM
from verl_avar.errors import ConfigError
from verl_avar.evaluation.benchmark.definition import load_suite

STAGES = ("data", "coldstart", "coldstart_agto", "rl", "evaluate", "report")
# Names of the evaluated checkpoints, in the order of training.
CHECKPOINTS = ("base", "coldstart", "coldstart_agto", "avar")


class SettingsError(ValueError):
    """A mistake in a recipe's settings or inputs, worded for the person who made it."""


@dataclass
class Needs:
    """What the machine must have before anything starts."""

    disk_gib: float = 0.0
    memory_gib: float = 0.0
    versions: bool = True  # only those that setup.py names; false: any


@dataclass
class Data:
    """Where rows come from: parquet files in verl's formats, or sources to convert, or else the miniature's tasks.

    A source is a hub name, a folder or a file, with `@split` after it for another split than `train`.
    """

    sft: str | None = None
    rl: str | None = None
    eval: str | None = None
    sft_sources: list[str] = field(default_factory=list)  # conversations in ShareGPT layout
    rl_sources: list[str] = field(default_factory=list)  # questions with verifiable answers
    eval_sources: list[str] = field(default_factory=list)
    system: str = SYSTEM  # system turn of converted rows that have none
    max_pixels: int = MAX_PIXELS  # larger images are scaled down when they are converted
    sft_rows: int = 4096
    rl_rows: int = 1024
    eval_rows_per_task: int = 50


@dataclass
class Training:
    """One trainer: a config of verl_avar/training/config (or a yaml's path) and hydra overrides of it."""

    config: str = MISSING
    steps: int | None = None  # where given, it counts and not the epochs
    epochs: int | None = None
    overrides: list[str] = field(default_factory=list)


@dataclass
class Agto:
    """Weights of the objective in the second cold start (AVAR §3.2); the first has none."""

    alpha: float = 0.15
    beta: float = 0.15
    system_floor: float | None = None


@dataclass
class Vars:
    """The reward of GRPO, `acc + lambda_v · visual + lambda_f · format` (AVAR §3.3); see reward_fns/README.md."""

    lambda_v: float = 0.3
    lambda_f: float = 0.1
    visual: str = "ratio"


@dataclass
class Evaluation:
    max_new_tokens: int = 1024
    batch_size: int = 16  # questions asked of the server at a time, and answers measured at a time
    pictures: int = 3  # evaluation rows whose attention is drawn, for each of the first and last stage
    checkpoints: list[str] = field(default_factory=lambda: list(CHECKPOINTS))
    serve: list[str] = field(default_factory=list)  # options of `avar serve`, such as --tensor-parallel-size=4
    suite: str | None = None  # benchmarks of `avar eval` beside the held-out rows, such as avar7
    data: str | None = None  # folder of their copies; null: from the hub's cache or the hub


@dataclass
class Recipe:
    name: str = MISSING
    base: str = MISSING  # a checkpoint folder, a hub name, or "miniature" for the one that ships with the package
    seed: int = 0
    stages: list[str] = field(default_factory=lambda: list(STAGES))  # those that run unless --stages says otherwise
    nodes: int = 1
    gpus_per_node: int = 0  # 0: a machine without a GPU
    ray_address: str | None = None  # of a running cluster; null: RAY_ADDRESS, or else a Ray of this run alone
    environment: dict[str, str] = field(default_factory=dict)
    needs: Needs = field(default_factory=Needs)
    data: Data = field(default_factory=Data)
    coldstart: Training = field(default_factory=Training)
    agto: Agto = field(default_factory=Agto)
    rl: Training = field(default_factory=Training)
    vars: Vars = field(default_factory=Vars)
    reward_fn: str = "reward_fns/avar.py"
    evaluation: Evaluation = field(default_factory=Evaluation)


def load(path: Path, overrides: list[str]) -> DictConfig:
    """The recipe of a yaml with overrides. Raises SettingsError for anything unknown, missing or mistyped."""
    recipe = merged(Recipe, path, overrides)
    check(recipe, path.name)
    return recipe


def merged(schema: type, path: Path, overrides: list[str]) -> DictConfig:
    """A yaml with overrides as `schema`, a dataclass, has it. Raises SettingsError as `load` does."""
    try:
        if bad := [o for o in overrides if "=" not in o]:
            raise SettingsError(f"'{bad[0]}' is not an override; write key=value, such as rl.steps=30")
        try:
            given = OmegaConf.from_dotlist(overrides)
        except yaml.YAMLError as error:
            raise SettingsError(f"an override is no yaml: {' '.join(str(error).split())}") from None
        recipe = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(path), given)
        if missing := OmegaConf.missing_keys(recipe):
            raise SettingsError(f"{path.name}: no value for {', '.join(sorted(missing))}")
        return recipe
    except FileNotFoundError:
        raise SettingsError(f"no recipe {path}") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not a yaml file: {' '.join(str(error).split())}") from None
    except OmegaConfBaseException as error:
        where = f" (at {error.full_key})" if error.full_key else ""
        raise SettingsError(f"{path.name}: {str(error).splitlines()[0]}{where}") from None


def check(recipe: DictConfig, name: str) -> None:
    """Raises SettingsError for values that the types alone allow."""
    for key in ("coldstart", "rl"):
        if recipe[key].steps is None and recipe[key].epochs is None:
            raise SettingsError(f"{name}: no value for {key}.steps or {key}.epochs")
    for key, known, given in (
        ("stages", STAGES, recipe.stages),
        ("evaluation.checkpoints", CHECKPOINTS, recipe.evaluation.checkpoints),
    ):
        if unknown := [value for value in given if value not in known]:
            raise SettingsError(f"{name}: {key} has '{unknown[0]}'; known are {', '.join(known)}")
    if recipe.evaluation.suite is not None:
        try:
            load_suite(recipe.evaluation.suite)
        except ConfigError as error:
            raise SettingsError(f"{name}: evaluation.suite: {error}") from None
    elif recipe.evaluation.data is not None:
        raise SettingsError(f"{name}: evaluation.data is of evaluation.suite, which is not set")
    if recipe.nodes < 1 or recipe.gpus_per_node < 0:
        raise SettingsError(f"{name}: nodes is {recipe.nodes}, gpus_per_node {recipe.gpus_per_node}")


def fingerprint(*parts: DictConfig | str | int) -> str:
    """Short hash of the settings that a stage depends on."""
    plain = [OmegaConf.to_container(p) if OmegaConf.is_config(p) else p for p in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
