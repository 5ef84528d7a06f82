"""What is wrong with this machine and the inputs, found before anything is written or started: a line per problem."""

from __future__ import annotations

import netrc
import os
import shutil
from pathlib import Path

from omegaconf import DictConfig
from plan import Composed
from settings import STAGES, SettingsError
from trainers import ROOT, TRAINED, data_file, ray_address

GIB = 2**30
LOGGER_KEYS = {"wandb": ("WANDB_API_KEY", "WANDB_MODE"), "swanlab": ("SWANLAB_API_KEY", "SWANLAB_MODE")}


def chosen_stages(text: str | None, default: list[str] | tuple[str, ...] = STAGES) -> list[str]:
    """`--stages a,b` in their order; the recipe's own by default."""
    wanted = default if text is None else [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in STAGES]:
        raise SettingsError(f"unknown stage '{unknown[0]}'; the stages are {', '.join(STAGES)}")
    return [stage for stage in STAGES if stage in wanted]


def problems(recipe: DictConfig, out: Path, stages: list[str], composed: list[Composed]) -> list[str]:
    """Everything that would make a run of `stages` on this machine fail, a line each: what, where, how to fix."""
    checks = [
        lambda: check_folder(recipe, out),
        lambda: check_memory(recipe),
        lambda: check_versions(recipe),
        lambda: check_base(recipe.base),
        lambda: check_reward(recipe),
        lambda: check_loggers(composed),
        *(lambda kind=kind, column=column: check_data(recipe, kind, column) for kind, column in COLUMNS.items()),
    ]
    if "data" in stages:
        checks += [
            lambda name=name: check_source(name)
            for kind in COLUMNS
            if recipe.data[kind] is None
            for name in recipe.data[f"{kind}_sources"]
        ]
    if "evaluate" in stages:
        checks.append(lambda: check_suite(recipe))
    if recipe.gpus_per_node == 0:
        checks.append(check_port)
    else:
        if {*TRAINED} & {*stages}:
            checks.append(lambda: check_cluster(recipe))
        if {"evaluate", "report"} & {*stages}:
            checks.append(check_gpu_here)
    found = []
    for check in checks:
        try:
            check()
        except SettingsError as error:
            found.append(str(error))
    return found + megatron_problems(recipe, composed)


def check_folder(recipe: DictConfig, out: Path) -> None:
    """The run's folder can be made, and its disk has room."""
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


def check_memory(recipe: DictConfig, root: Path = Path("/")) -> None:
    """Memory of this machine or container. root: of the file system, as `available_memory` has it."""
    from verl_avar.doctor.environment import available_memory

    available = available_memory(root) / GIB
    if available < recipe.needs.memory_gib:
        raise SettingsError(
            f"{available:.1f} GiB of memory are available, the run needs {recipe.needs.memory_gib:g}; "
            "close other programs, or give the container more"
        )


def check_versions(recipe: DictConfig) -> None:
    """The packages of this environment are in the ranges of setup.py, which were tried together."""
    from verl_avar.doctor.environment import BOOTSTRAP, versions

    if not recipe.needs.versions:
        return
    stack = "gpu" if recipe.gpus_per_node else "cpu"
    if wrong := [f"{finding.name} {finding.detail}" for finding in versions(stack) if not finding.ok]:
        raise SettingsError(
            f"versions: {'; '.join(wrong)}; {BOOTSTRAP[stack]} installs the tested ones, needs.versions=false goes on"
        )


def megatron_problems(recipe: DictConfig, composed: list[Composed]) -> list[str]:
    """What verl's Megatron backend lacks in this environment, a line per package; none where no stage trains on it."""
    from verl_avar.doctor.environment import BOOTSTRAP, installed, versions
    from verl_avar.training.checks import engine_of

    if all(engine_of(part.config).strategy != "megatron" for part in composed):
        return []
    return [
        f"{finding.name}: {finding.detail}; {BOOTSTRAP['megatron']} installs it"
        for finding in versions("megatron", core=False)
        if not finding.ok and (recipe.needs.versions or installed(finding.name) is None)
    ]


def check_base(base: str) -> None:
    """A base that looks like a folder must hold a model; without a network a hub name must be in the cache."""
    if base == "miniature":
        return
    if base.startswith((".", "/", "~")) or Path(base).exists():
        folder = Path(base).expanduser()
        if not (folder / "config.json").is_file():
            raise SettingsError(f"base: no model in {folder} (config.json is missing)")
        return
    from huggingface_hub import constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE and not isinstance(try_to_load_from_cache(base, "config.json"), str):
        raise SettingsError(
            f"base: {base} is not in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set; "
            f"`hf download {base}` where there is a network, or set base to a folder"
        )


def check_reward(recipe: DictConfig) -> None:
    if not (path := ROOT / recipe.reward_fn).is_file():
        raise SettingsError(f"reward_fn: no file {path}")


def check_loggers(composed: list[Composed]) -> None:
    """Keys of the loggers that a trainer uses."""
    used = {name for part in composed for name in _loggers(part)}
    for name, (key, mode) in LOGGER_KEYS.items():
        quiet = os.environ.get(mode, "").lower() in ("offline", "disabled", "dryrun", "local")
        if name in used and not quiet and key not in os.environ and not (name == "wandb" and _wandb_login()):
            raise SettingsError(
                f"trainer.logger has {name}, but {key} is not set; export it, or {mode}=offline, or leave {name} out"
            )


def _loggers(part: Composed) -> list[str]:
    logger = part.config.trainer.logger
    return [logger] if isinstance(logger, str) else list(logger)


def _wandb_login() -> bool:
    """Whether `wandb login` left its key in ~/.netrc."""
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def check_port() -> None:
    """A port that the user fixed for the process group must be free."""
    from verl_avar.training.environment import fixed_port, free_port

    try:
        free_port(fixed_port())
    except RuntimeError as error:
        raise SettingsError(str(error)) from None


COLUMNS = {"sft": "messages", "rl": "prompt", "eval": "prompt"}


def check_data(recipe: DictConfig, kind: str, column: str) -> None:
    """The user's own parquet file: columns, roles, and images, which rows of the cold start may lack beside others."""
    from verl_avar.errors import ConfigError
    from verl_avar.training.checks import check_files, check_roles

    if recipe.data[kind] is not None:
        try:
            check_files(recipe.data[kind], columns=[column, "images"], mixed=kind == "sft")
            check_roles(recipe.data[kind], column)
        except ConfigError as error:
            raise SettingsError(f"data.{kind}: {error}") from None
        if kind == "eval":
            check_held_out(data_file(recipe, Path(), kind))


def check_held_out(path: Path) -> None:
    """Every row of the user's own file is a question with an answer and an id of its own."""
    from evaluation import held_out

    from verl_avar.errors import ConfigError
    from verl_avar.evaluation.benchmark.load import load

    try:
        for _ in load(held_out(path), path):
            pass
    except ConfigError as error:
        # The option that it names is one of `avar eval`.
        raise SettingsError(f"data.eval: {str(error).removesuffix('; --allow-broken leaves them out')}") from None


def check_suite(recipe: DictConfig) -> None:
    """The copies of the benchmarks that the recipe names are there, or can be had from the hub."""
    from verl_avar.data.published import check_reachable
    from verl_avar.errors import ConfigError
    from verl_avar.evaluation.benchmark.copies import find_copy, missing
    from verl_avar.evaluation.benchmark.definition import load_suite

    settings = recipe.evaluation
    data = Path(settings.data).expanduser() if settings.data else None
    try:
        for benchmark in () if settings.suite is None else load_suite(settings.suite):
            for part in benchmark.parts:
                if (data is not None and find_copy(benchmark, part, data)) or part.generate:
                    continue
                if data is not None or part.hub is None:
                    raise missing(benchmark, part, data)
                check_reachable(part.hub)
    except ConfigError as error:
        raise SettingsError(f"evaluation.data: {error}") from None


def check_source(name: str) -> None:
    """A source of rows can be read, as far as that can be told without reading it."""
    from verl_avar.data.published import check_reachable
    from verl_avar.errors import ConfigError

    try:
        check_reachable(name)
    except ConfigError as error:
        raise SettingsError(str(error)) from None


def check_cluster(recipe: DictConfig) -> None:
    """Enough GPUs: in the Ray cluster that the run joins, or else in this machine."""
    from ray_cluster import gpus_of_nodes

    address, wanted = ray_address(recipe), f"{recipe.nodes} × {recipe.gpus_per_node} GPUs"
    if address == "local":
        if recipe.nodes > 1:
            raise SettingsError(
                f"{wanted} are wanted, and there is no Ray cluster to join; `ray start` on every node, then "
                "ray_address=HOST:PORT or RAY_ADDRESS"
            )
        found = [_gpus_here()]
    else:
        found = gpus_of_nodes(address)
    if sum(gpus >= recipe.gpus_per_node for gpus in found) < recipe.nodes:
        where = "this machine" if address == "local" else f"the Ray cluster {address}"
        raise SettingsError(
            f"{wanted} are wanted, {where} has {' + '.join(f'{gpus:g}' for gpus in found) or 'none'}; "
            "set nodes and gpus_per_node to what there is"
        )


def check_gpu_here() -> None:
    if _gpus_here() == 0:
        raise SettingsError(
            "evaluate and report need a GPU on the machine that the runner is started on, and it has none; "
            "start it on a GPU node, or leave them out by --stages"
        )


def _gpus_here() -> int:
    import torch

    return torch.cuda.device_count()
