"""A sweep: several runs of one recipe, each in a folder of its own; later ones may take stages from earlier ones.

Shared stages are links to the other run's folders, so that the runner's own check applies: a stage that was made with
other settings is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING, DictConfig, OmegaConf
from settings import STAGES, SettingsError, load, merged


@dataclass
class Variant:
    stages: list[str] = MISSING
    overrides: list[str] = field(default_factory=list)  # of the recipe
    share: str | None = None  # an earlier run, whose stages stand for those that are not named here


@dataclass
class Sweep:
    name: str = MISSING
    recipe: str = MISSING  # a yaml beside this one
    runs: dict[str, Variant] = MISSING


@dataclass(frozen=True)
class Run:
    """One run: its settings and folder, and the stages that lie in another run's folder or will by then."""

    recipe: DictConfig
    out: Path
    shared: Path | None = None
    given: tuple[str, ...] = ()


def is_sweep(path: Path) -> bool:
    """Whether a yaml describes a sweep and not one run."""
    return path.is_file() and any(line.startswith("runs:") for line in path.read_text().splitlines())


def runs_of(path: Path, out: Path | None, overrides: list[str]) -> list[Run]:
    """The runs of a sweep in their order; `overrides` apply to all. Raises SettingsError for a mistake in any."""
    sweep = merged(Sweep, path, [])
    folder = out or Path("runs") / sweep.name
    found: dict[str, Run] = {}
    for name, variant in sweep.runs.items():
        stages = f"stages=[{','.join(variant.stages)}]"
        recipe = load(path.parent / sweep.recipe, [stages, *variant.overrides, *overrides])
        shared, given = None, ()
        if variant.share is not None:
            if variant.share not in found:
                raise SettingsError(f"{path.name}: run '{name}' shares '{variant.share}', which is no earlier run")
            other = found[variant.share]
            shared = other.out
            given = tuple(s for s in STAGES if s in (*other.given, *other.recipe.stages) and s not in variant.stages)
        found[name] = Run(OmegaConf.merge(recipe, {"name": f"{sweep.name}/{name}"}), folder / name, shared, given)
    return list(found.values())


def link(run: Run) -> None:
    """Puts the shared stages into a run's folder. `evaluate` and `report` are a run's own and are not shared."""
    run.out.mkdir(parents=True, exist_ok=True)
    for stage in run.given:
        place = run.out / stage
        if stage not in ("evaluate", "report") and not place.exists():
            place.symlink_to((run.shared / stage).absolute())
