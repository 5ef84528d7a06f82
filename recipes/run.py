"""The runner of every recipe: checks the inputs, runs the stages that are not done yet, prints the report.

python recipes/run.py RECIPE.yaml [--dry-run] [--stages a,b] [--out DIR] [key=value …]

Each stage leaves `DIR/STAGE/done.json`; running the command again skips it, and goes on where an unfinished stage
stopped. A setting that a finished stage depended on can't change under it.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import plan
import preflight
from files import read_json, write_json
from omegaconf import DictConfig
from rich.console import Console
from settings import STAGES, SettingsError, fingerprint, load
from sweep import Run, is_sweep, link, runs_of
from trainer_process import StageFailed

DONE, SETTINGS = "done.json", "settings.json"
# What has to be there before a stage.
NEEDS = {
    "data": [],
    "coldstart": ["data"],
    "coldstart_agto": ["data"],
    "rl": ["data", "coldstart_agto"],
    "evaluate": ["data"],
    "report": ["data", "evaluate"],
}
# They look at what the other stages left, which may be more than the last time; evaluate keeps what it has.
REPEATED = ("evaluate", "report")
EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED = 2, 1, 130


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path, help="a yaml of recipes/, of one run or of a sweep")
    parser.add_argument("--stages", help=f"comma-separated, of {', '.join(STAGES)}; the recipe's by default")
    parser.add_argument("--out", type=Path, help="folder of the run (default: runs/NAME)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the yaml, such as rl.steps=30")
    parser.add_argument(
        "--dry-run", action="store_true", help="compose and check everything, print what would run, write nothing"
    )
    args = parser.parse_intermixed_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    errors = Console(stderr=True)
    try:
        runs = chosen_runs(args)
        for this in runs:  # all of them before the first starts
            check(this, args, console, errors)
        for this in runs if not args.dry_run else ():
            link(this)
            run(this.recipe, this.out, preflight.chosen_stages(args.stages, this.recipe.stages), console)
    except SettingsError as error:
        for line in error.args:
            errors.print(f"error: {line}", style="red", highlight=False, soft_wrap=True, markup=False)
        return EXIT_BAD_INPUT
    except StageFailed as error:
        errors.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        errors.print("  run the same command again to go on from the last checkpoint", highlight=False)
        return EXIT_FAILED
    except KeyboardInterrupt:
        errors.print("interrupted; run the same command again to go on from the last checkpoint", highlight=False)
        return EXIT_INTERRUPTED
    return 0


def chosen_runs(args: argparse.Namespace) -> list[Run]:
    """The runs that a command line asks for: one, or those of a sweep. Raises SettingsError for a mistake in any."""
    if is_sweep(args.recipe):
        if args.stages is not None:
            raise SettingsError(f"--stages is for one run; the runs of {args.recipe.name} name their stages")
        return runs_of(args.recipe, args.out, args.overrides)
    recipe = load(args.recipe, args.overrides)
    return [Run(recipe, args.out or Path("runs") / recipe.name)]


def check(this: Run, args: argparse.Namespace, console: Console, errors: Console) -> None:
    """Raises SettingsError with a line per problem of one run.

    In a dry run what would run is printed, and so are the machine's problems, which are then no error.
    """
    recipe, out = this.recipe, this.out
    prepare_environment(recipe)
    stages = pending(recipe, out, preflight.chosen_stages(args.stages, recipe.stages), this.given)
    composed = plan.compose_stages(recipe, out, stages)
    found = preflight.problems(recipe, out, stages, composed) if args.dry_run or {*stages} - {*REPEATED} else []
    if args.dry_run:
        plan.show(recipe, out, stages, composed, console)
        for line in found:
            errors.print(f"problem: {line}", style="yellow", highlight=False, soft_wrap=True, markup=False)
    elif found:
        raise SettingsError(*found)


def prepare_environment(recipe: DictConfig) -> None:
    """Environment of this process and its trainers; what the user exported wins over the recipe."""
    from verl_avar.training.environment import prepare

    for name, value in recipe.environment.items():
        os.environ.setdefault(name, value)
    prepare(cpu=recipe.gpus_per_node == 0)
    signal.signal(signal.SIGTERM, interrupt)


def interrupt(*_) -> None:
    """SIGTERM ends a run as Ctrl-C does, also where Ctrl-C is ignored (a background job); a trainer saves first."""
    raise KeyboardInterrupt


def pending(recipe: DictConfig, out: Path, chosen: list[str], given: tuple[str, ...] = ()) -> list[str]:
    """The chosen stages that have something to do. given: stages that another run leaves here.

    Raises SettingsError where a stage was begun with other settings, or where what a stage needs is neither done nor
    chosen.
    """
    for stage in STAGES:
        began_with = read_json(out / stage / SETTINGS)
        if began_with is not None and stage != "report" and began_with != stage_fingerprint(recipe, stage):
            raise SettingsError(
                f"the settings of stage '{stage}' differ from those that {out / stage} was made with; "
                "use another --out, or delete that folder and those of the later stages to make it again"
            )
    for stage in chosen:
        for needed in NEEDS[stage]:
            if needed not in (*chosen, *given) and not (out / needed / DONE).exists():
                raise SettingsError(f"stage '{stage}' needs '{needed}', which is not done in {out}; add it to --stages")
    return [stage for stage in chosen if stage in REPEATED or not (out / stage / DONE).exists()]


def stage_fingerprint(recipe: DictConfig, stage: str) -> str:
    """Hash of what a stage's result depends on."""
    parts = [recipe.base, recipe.seed, recipe.data]
    if stage != "data":
        parts.append(recipe.coldstart)
    if stage not in ("data", "coldstart"):
        parts.append(recipe.agto)
    if stage in ("rl", "evaluate"):
        parts += [recipe.rl, recipe.vars, recipe.reward_fn]
    if stage == "evaluate":
        parts.append(recipe.evaluation)
    return fingerprint(*parts)


def run(recipe: DictConfig, out: Path, chosen: list[str], console: Console) -> None:
    """Runs the chosen stages in order in the run folder `out`."""
    import stages

    from verl_avar.errors import ConfigError

    out.mkdir(parents=True, exist_ok=True)
    with only_run(out):
        for stage in chosen:
            folder = out / stage
            marker = folder / DONE
            if marker.exists() and stage not in REPEATED:
                console.print(f"{stage}: done before ({read_json(marker)['seconds']:.0f} s), skipped", highlight=False)
                continue
            folder.mkdir(exist_ok=True)
            write_json(folder / SETTINGS, stage_fingerprint(recipe, stage))
            with clock(folder) as seconds:
                try:
                    getattr(stages, stage)(recipe, out, console)
                except ConfigError as error:  # of rows that can't be converted
                    raise SettingsError(f"{stage}: {error}") from None
            write_json(marker, {"seconds": seconds()})
            console.print(f"{stage}: done in {seconds():.0f} s", highlight=False)


@contextmanager
def clock(folder: Path):
    """Seconds spent on a stage, those of interrupted attempts included."""
    path = folder / "seconds.json"
    before = read_json(path, 0.0)
    start = time.monotonic()

    def seconds() -> float:
        return before + time.monotonic() - start

    try:
        yield seconds
    finally:
        write_json(path, seconds())


@contextmanager
def only_run(out: Path):
    """Two runs in one folder would overwrite each other's checkpoints."""
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(
                f"another run is using {out}; wait for it, or choose another folder with --out"
            ) from None
        yield


if __name__ == "__main__":
    sys.exit(main())
