"""What can be found wrong before anything is written or started. Each finding is one line: what, where, how to fix."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil
from omegaconf import DictConfig
from settings import SettingsError

GIB = 2**30
STAGES = ("data", "coldstart", "coldstart_agto", "rl", "evaluate", "report")


def chosen_stages(text: str | None) -> list[str]:
    """`--stages a,b` in their order; all by default."""
    wanted = STAGES if text is None else [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in STAGES]:
        raise SettingsError(f"unknown stage '{unknown[0]}'; the stages are {', '.join(STAGES)}")
    return [stage for stage in STAGES if stage in wanted]


def check(recipe: DictConfig, out: Path, stages: list[str]) -> None:
    """Raises SettingsError for the first thing that would make the run fail later."""
    from verl_avar.training.compose import ConfigError, compose

    check_machine(recipe, out)
    check_base(recipe.base)
    try:
        if {"coldstart", "coldstart_agto"} & set(stages):
            compose(recipe.coldstart.config, list(recipe.coldstart.overrides))
        if "rl" in stages:
            compose(recipe.rl.config, list(recipe.rl.overrides))
    except ConfigError as error:
        raise SettingsError(str(error)) from None
    if not (root := Path(__file__).parent.parent / recipe.reward_fn).is_file():
        raise SettingsError(f"reward_fn: no file {root}")
    check_port()
    check_data(recipe)


def check_machine(recipe: DictConfig, out: Path) -> None:
    """Disk where the run goes, and memory."""
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not place.is_dir():
        raise SettingsError(f"{place} is a file; choose a folder with --out DIR")
    if not os.access(place, os.W_OK):
        raise SettingsError(f"cannot write to {place}; choose another folder with --out DIR")
    free = shutil.disk_usage(place).free / GIB
    if free < recipe.needs.disk_gib:
        raise SettingsError(
            f"{place} has {free:.1f} GiB free, the run needs {recipe.needs.disk_gib:g}; "
            "free some, or choose another disk with --out DIR"
        )
    available = psutil.virtual_memory().available / GIB
    if available < recipe.needs.memory_gib:
        raise SettingsError(
            f"{available:.1f} GiB of memory are available, the run needs {recipe.needs.memory_gib:g}; "
            "close other programs"
        )


def check_base(base: str) -> None:
    """A base that looks like a folder must hold a model."""
    if base != "miniature" and (base.startswith((".", "/", "~")) or Path(base).exists()):
        folder = Path(base).expanduser()
        if not (folder / "config.json").is_file():
            raise SettingsError(f"base: no model in {folder} (config.json is missing)")


def check_port() -> None:
    """A port that the user fixed for the process group must be free."""
    from verl_avar.training.environment import fixed_port, free_port

    try:
        free_port(fixed_port())
    except RuntimeError as error:
        raise SettingsError(str(error)) from None


def check_data(recipe: DictConfig) -> None:
    """The user's own parquet files: columns, images and roles."""
    from verl_avar.training.checks import check_files, check_roles
    from verl_avar.training.compose import ConfigError

    for key, column in (("sft", "messages"), ("rl", "prompt"), ("eval", "prompt")):
        if recipe.data[key] is not None:
            try:
                check_files(recipe.data[key], columns=[column, "images"])
                check_roles(recipe.data[key], column)
            except ConfigError as error:
                raise SettingsError(f"data.{key}: {error}") from None
