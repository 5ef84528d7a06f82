"""Hydra composition of our configs over verl's own, with one line per mistake."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from omegaconf import DictConfig

from verl_avar.errors import ConfigError

CONFIGS = Path(__file__).parent / "config"


def verl_configs() -> Path:
    """verl's config folder, found without importing verl, which would choose the platform now."""
    spec = find_spec("verl")
    if spec is None or spec.origin is None:
        raise ConfigError("verl is not installed in this environment; run recipes/bootstrap.sh")
    return Path(spec.origin).parent / "trainer" / "config"


def compose(name: str, overrides: list[str]) -> DictConfig:
    """Config `name` of training/config/ (or a path to a yaml) with hydra overrides applied, unresolved.

    Raises ConfigError for an unknown config, key or value.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    path = Path(name)
    folder, stem = (path.parent.resolve(), path.stem) if path.suffix == ".yaml" else (CONFIGS, name)
    if not (folder / f"{stem}.yaml").is_file():
        known = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.yaml")))
        raise ConfigError(f"no config {name}; use one of {known}, or the path of a yaml")
    try:
        with initialize_config_dir(str(folder), version_base=None):
            return hydra_compose(stem, [f"hydra.searchpath=['file://{verl_configs()}','file://{CONFIGS}']", *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ or error
        raise ConfigError(f"{stem}: {' '.join(str(cause).split())}") from error


def verl_defaults(name: str, overrides: list[str]) -> DictConfig:
    """A config of verl's own as it is installed, without anything of ours."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(verl_configs()), version_base=None):
        return hydra_compose(name, overrides)


def arguments(prog: str, default: str, argv: list[str] | None) -> tuple[str, list[str]]:
    """`--config-name NAME key=value …`: the config's name and the overrides."""
    parser = argparse.ArgumentParser(prog=prog, description="verl's hydra overrides, key=value")
    parser.add_argument(
        "--config-name", default=default, help="a config of verl_avar/training/config, or a yaml's path"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    chosen = parser.parse_args(argv)
    return chosen.config_name, chosen.overrides
