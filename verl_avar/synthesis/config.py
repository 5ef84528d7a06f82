"""A synthesis run's settings: a yaml checked against these dataclasses, with `key=value` overrides on top.

API keys are no settings: an endpoint names the environment variable that holds its key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl_avar.calls.private import check_address, check_no_key
from verl_avar.calls.settings import Endpoint
from verl_avar.data.schema import MAX_PIXELS, SYSTEM
from verl_avar.errors import ConfigError
from verl_avar.synthesis.checks.settings import Checks
from verl_avar.synthesis.outcomes import STAGES

KEEP = ("first", "shortest", "longest", "most_anchors", "attention")
OUTPUTS = ("sft", "rl", "sharegpt", "dataset")
# What the run itself decides about a request, and arguments of OpenAI's client that are no part of one.
NOT_SAMPLING = (
    "model",
    "messages",
    "n",
    "stream",
    "stream_options",
    "timeout",
    "extra_body",
    "extra_headers",
    "extra_query",
)


@dataclass
class Source:
    """Where rows come from; see `avar data sources`."""

    path: str = MISSING  # hub name, folder or file
    reader: str = "generic"
    split: str = "train"
    limit: int | None = None  # rows taken, from the start
    columns: dict[str, str] = field(default_factory=dict)  # generic: our column -> the source's


@dataclass
class Price:
    """Per million tokens, in any one currency."""

    prompt: float = 0.0
    completion: float = 0.0


@dataclass
class Stage:
    """One model's part of the work."""

    endpoint: str = MISSING  # a name of `endpoints`
    model: str = MISSING
    prompt: str | None = None  # jinja file with blocks system and user; beside the yaml; null: the shipped one
    images: bool = False  # send the images; `describe` must, the others may
    # Any further fields of the request: temperature, top_p, max_tokens, …, and a server's own, such as vLLM's top_k.
    sampling: dict[str, Any] = field(default_factory=dict)
    send_seed: bool = True  # a `seed` for each call, of the run's; false for servers that refuse one
    reasoning: bool = False  # put a model's separate `reasoning_content` into <think>…</think> before its answer
    candidates: int = 1  # texts asked for; one is kept
    keep: str = "first"  # of those that pass the checks: KEEP
    price: Price = field(default_factory=Price)


@dataclass
class Stages:
    describe: Stage = field(default_factory=lambda: Stage(images=True))
    reason: Stage = field(default_factory=Stage)
    anchor: Stage = field(default_factory=Stage)


@dataclass
class Budget:
    """Of all runs into this folder; null: none. When it is spent, requests in flight end and no more are made."""

    tokens: int | None = None
    cost: float | None = None


@dataclass
class Duplicates:
    exact: bool = True  # same question, answer, choices and image files
    near: bool = True  # nearly the same question and image, same answer
    question_similarity: float = 90.0  # 0 to 100, RapidFuzz's ratio
    image_distance: int = 3  # bits of 64 in which perceptual hashes may differ


@dataclass
class Overlap:
    """Benchmarks whose questions must not be trained on."""

    benchmarks: list[str] = field(default_factory=list)  # local copies, read as sources are
    hashes: list[str] = field(default_factory=list)  # files that `avar data hashes` wrote
    image_distance: int = 3
    question_similarity: float = 90.0


@dataclass
class Attention:
    """Optional: what a student model looks at while it reads each chain decides about it."""

    model: str | None = None  # checkpoint folder or hub name; null: not measured
    device: str = "cpu"
    batch_size: int = 4
    keep: float = 1.0  # share of accepted rows kept, those with the most attention to the image
    weight: bool = False  # write a weight per row, proportional to its attention, mean 1


@dataclass
class Synthesis:
    name: str = MISSING
    out: str = MISSING  # folder of everything that the run writes
    seed: int = 0
    sources: list[Source] = MISSING
    endpoints: dict[str, Endpoint] = MISSING
    stages: Stages = field(default_factory=Stages)
    checks: Checks = field(default_factory=Checks)
    duplicates: Duplicates = field(default_factory=Duplicates)
    overlap: Overlap = field(default_factory=Overlap)
    budget: Budget = field(default_factory=Budget)
    attention: Attention = field(default_factory=Attention)
    outputs: list[str] = field(default_factory=lambda: ["sft"])
    system: str = SYSTEM  # system turn of the training rows
    max_pixels: int = MAX_PIXELS  # larger images are scaled down
    viewer_rows: int = 60  # samples shown in the viewer: accepted ones and of every reason


def load(path: Path | str, overrides: list[str] = ()) -> DictConfig:
    """The settings of a yaml with overrides. Raises ConfigError for anything unknown, missing, mistyped or unsafe."""
    path = Path(path)
    try:
        given = OmegaConf.load(path)
        if not isinstance(given, DictConfig):
            raise ConfigError(f"{path}: not a yaml of settings")
        if bad := [o for o in overrides if "=" not in o]:
            raise ConfigError(f"'{bad[0]}' is not an override; write key=value, such as budget.cost=20")
        overridden = OmegaConf.from_dotlist(list(overrides))
        for part in (given, overridden):
            check_no_key(OmegaConf.to_container(part), path)
        config = OmegaConf.merge(OmegaConf.structured(Synthesis), given, overridden)
        if missing := OmegaConf.missing_keys(config):
            raise ConfigError(f"{path}: no value for {', '.join(sorted(missing))}")
        check(config, path)
    except FileNotFoundError:
        raise ConfigError(f"no config {path}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not a yaml file: {' '.join(str(error).split())}") from None
    except OmegaConfBaseException as error:
        where = f" (at {error.full_key})" if error.full_key else ""
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}{where}") from None
    for stage in STAGES:
        if config.stages[stage].prompt is not None:
            prompt = path.parent / Path(config.stages[stage].prompt).expanduser()
            config.stages[stage].prompt = str(prompt.absolute())  # workers of a cluster have other working folders
    return config


def check(config: DictConfig, path: Path) -> None:
    """Raises ConfigError for values that the types alone allow."""
    for name, endpoint in config.endpoints.items():
        for key, schemes in (("base_url", ("http", "https")), ("proxy", ("http", "https", "socks5", "socks5h"))):
            if endpoint[key] is not None:
                check_address(endpoint[key], schemes, f"{path}: endpoints.{name}.{key}")
        for key in ("concurrency", "attempts", "timeout_s"):
            if endpoint[key] <= 0:
                raise ConfigError(f"{path}: endpoints.{name}.{key} must be positive, it is {endpoint[key]}")
        for key in ("backoff_s", "backoff_max_s"):
            if endpoint[key] < 0:
                raise ConfigError(f"{path}: endpoints.{name}.{key} must not be negative, it is {endpoint[key]}")
        for key in ("requests_per_minute", "tokens_per_minute"):
            if endpoint[key] is not None and endpoint[key] <= 0:
                raise ConfigError(f"{path}: endpoints.{name}.{key} must be positive, it is {endpoint[key]}")
    for name in STAGES:
        stage = config.stages[name]
        if stage.endpoint not in config.endpoints:
            known = ", ".join(config.endpoints)
            raise ConfigError(f"{path}: stages.{name}.endpoint is '{stage.endpoint}'; endpoints are {known}")
        if stage.keep not in KEEP or (stage.keep in KEEP[3:] and name != "anchor"):
            known = KEEP if name == "anchor" else KEEP[:3]
            raise ConfigError(f"{path}: stages.{name}.keep is '{stage.keep}'; known are {', '.join(known)}")
        if stage.candidates < 1:
            raise ConfigError(f"{path}: stages.{name}.candidates must be at least 1, it is {stage.candidates}")
        if wrong := [key for key in stage.sampling if key in NOT_SAMPLING]:
            how = "write what it holds right below sampling" if wrong[0] == "extra_body" else "it can't be set there"
            raise ConfigError(f"{path}: stages.{name}.sampling.{wrong[0]}: {how}")
        if stage.send_seed and "seed" in stage.sampling:
            raise ConfigError(
                f"{path}: stages.{name}.sampling has seed, but each call is sent its own; the run's is `seed`, "
                "and send_seed: false sends this one with every call"
            )
    if config.budget.cost is not None and not any(any(config.stages[name].price.values()) for name in STAGES):
        raise ConfigError(f"{path}: budget.cost is {config.budget.cost:g}, but no stage has a price")
    if not config.stages.describe.images:
        raise ConfigError(f"{path}: stages.describe.images is false, but a description needs the images")
    if config.stages.anchor.keep == "attention" and config.attention.model is None:
        raise ConfigError(f"{path}: stages.anchor.keep is attention; name the student in attention.model")
    if unknown := [output for output in config.outputs if output not in OUTPUTS]:
        raise ConfigError(f"{path}: outputs has '{unknown[0]}'; known are {', '.join(OUTPUTS)}")
    if not config.sources:
        raise ConfigError(f"{path}: sources is empty")
    if not 0 < config.attention.keep <= 1:
        raise ConfigError(f"{path}: attention.keep must be in (0, 1], it is {config.attention.keep}")
