"""What can be wrong with a run's inputs, found before anything expensive starts. Each mistake is one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from verl_avar.errors import ConfigError

KNOWN_ROLES = frozenset({"system", "user", "assistant", "tool"})
TRAINER_MODES = ("avar_sync", "avar_colocate_async", "avar_separate_async")
ASYNC_MODES = ("colocate_async", "separate_async")  # verl's own
# The block of an actor's config that configures its engine, for the strategies that AVAR has an engine for.
ENGINE_BLOCKS = {"fsdp": "fsdp_config", "fsdp2": "fsdp_config", "megatron": "megatron"}


class Engine(NamedTuple):
    """The engine that a run trains with: its block and where that is in the config, and verl's name of the backend."""

    key: str
    block: Any
    strategy: str


def engine_of(config: Any) -> Engine:
    """The engine of a whole SFT or RL config. Raises ConfigError for a strategy that AVAR has no engine for."""
    actor = None if "actor_rollout_ref" not in config else config.actor_rollout_ref.actor
    key, part = ("engine", config.engine) if actor is None else ("actor_rollout_ref.actor", actor)
    strategy = part.get("strategy")
    if strategy not in ENGINE_BLOCKS:
        raise ConfigError(f"{key}.strategy={strategy}: AVAR has no engine for it; use {', '.join(ENGINE_BLOCKS)}")
    if actor is None:
        return Engine(key, part, strategy)
    name = ENGINE_BLOCKS[strategy]
    return Engine(f"{key}.{name}", part[name], strategy)


def check_objective(config: Any) -> None:
    """Raises ConfigError for a run whose engine's block `avar` the engine would refuse."""
    from verl_avar.training.config import AvarConfig

    try:
        AvarConfig.of(engine_of(config).block.get("avar"))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_visual_reward(config: Any) -> None:
    """Raises ConfigError where a run's settings of VARS (`avar.vars`) are bad or contradict others of the run."""
    from verl_avar.training.config import AvarConfig
    from verl_avar.training.visual_reward import VisualReward

    try:
        settings = VisualReward.of(config)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    mode, modes = config.trainer.v1.trainer_mode, ", ".join(TRAINER_MODES)
    if mode in ASYNC_MODES and settings.source == "rollout" and settings.lambda_v:
        raise ConfigError(
            f"trainer.v1.trainer_mode={mode}: verl's own client drops the rollouts' scores; set avar_{mode}"
        )
    if not settings.by_trainer:
        return
    said = f"avar.vars.source={settings.source}, normalise={settings.normalise}"
    if mode not in TRAINER_MODES:
        raise ConfigError(f"{said}: the trainer adds the visual term; set trainer.v1.trainer_mode to one of {modes}")
    if settings.source != "actor":
        return
    if (config.algorithm.get("rollout_correction") or {}).get("bypass_mode", False):
        raise ConfigError(
            f"{said}: algorithm.rollout_correction.bypass_mode skips the pass that measures; set it to false, or "
            "source=rollout"
        )
    engine = engine_of(config)
    avar = AvarConfig.of(engine.block.get("avar"))
    if not avar.measures(training=False):
        raise ConfigError(
            f"{said}: {engine.key}.avar.masses={avar.masses} measures nothing in the old-log-prob pass; set it to "
            "infer or always"
        )


def check_model(path: str) -> None:
    """Raises ConfigError where `path` looks like a folder but holds no model."""
    folder = Path(path).expanduser()
    if not folder.is_absolute() and not folder.exists():
        return  # a hub name
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model.path: no model in {folder} (config.json is missing)")


def check_roles(files: str | Sequence[str], column: str) -> None:
    """Raises ConfigError for a message whose role no chat template knows. column: lists of {role, content}."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in [files] if isinstance(files, str) else files:
        rows = pq.read_table(Path(str(path)).expanduser(), columns=[column]).column(column)
        try:
            roles = set(rows.combine_chunks().flatten().field("role").unique().to_pylist())
        except (AttributeError, KeyError, pa.ArrowException) as error:
            raise ConfigError(f"{path}: {column} is not a list of {{role, content}}") from error
        if unknown := sorted(map(str, roles - KNOWN_ROLES)):
            raise ConfigError(
                f"{path}: {column} has the role {', '.join(unknown)}; the roles are {', '.join(sorted(KNOWN_ROLES))}"
            )


def check_files(
    files: str | Sequence[str] | None, columns: Sequence[str], images: str | None = "images", mixed: bool = False
) -> None:
    """Raises ConfigError for a parquet file that is missing, unreadable or empty, or lacks columns or images.

    columns: names that must be there. images: the column in which every row must have at least one; None: no such rule.
    mixed: rows without an image may stand beside rows with one, in the same file or in others.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if not files:
        raise ConfigError("no data file given (data.train_files)")
    rows_with_images = rows = 0
    for name in [files] if isinstance(files, str) else files:
        path = Path(str(name)).expanduser()
        if not path.is_file():
            raise ConfigError(f"no data file {path}")
        try:
            parquet = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise ConfigError(f"{path} is not a parquet file: {error}") from error
        if missing := [c for c in columns if c not in parquet.schema_arrow.names]:
            raise ConfigError(
                f"{path} has no column {', '.join(missing)}; it has {', '.join(parquet.schema_arrow.names)}"
            )
        if parquet.metadata.num_rows == 0:
            raise ConfigError(f"{path} has no rows")
        if images is not None:
            # In batches: the images of a whole file need not fit into memory.
            bare = null = 0
            for batch in parquet.iter_batches(batch_size=256, columns=[images]):
                lengths = pc.list_value_length(batch.column(0))
                bare += pc.sum(pc.less(pc.fill_null(lengths, 0), 1)).as_py()
                null += lengths.null_count
            total = parquet.metadata.num_rows
            if bare and not mixed:
                raise ConfigError(f"{path}: {bare} of {total} rows have no image; visual attention needs one")
            if null:
                raise ConfigError(f"{path}: {images} is null in {null} of {total} rows; verl wants an empty list there")
            rows_with_images, rows = rows_with_images + total - bare, rows + total
    if images is not None and not rows_with_images:
        raise ConfigError(f"none of {rows} rows has an image; visual attention needs some")
