"""The schema of results.json, and how its figures are read and written.

Figures that were not measured are left out, or None:

    stages  list, in the order of training, of
            name      base | coldstart | coldstart_agto | avar, or any other name
            accuracy  {"all": 0..1, TASK: 0..1}         greedy answers
            shuffled  {"all": 0..1, TASK: 0..1}         the same, with the images of other samples
            samples   how many samples "all" is over (optional, for standard errors)
            vas       {"user" | "response": {"paper", "head_mean", "median"}}  (AVAR §VAS)
            mass      {"visual": 0..1, "system": 0..1}  means over layers, heads and response queries
            dtype     number format of the model that gave the figures (optional)
            seconds   wall clock of the stage
    rl      list, a GRPO step each, of step, reward, acc, format, visual, and (optional) visual_ratio, visual_mass,
            system_mass: means over the step's rollouts, named as reward_fns/avar.py names them
    notes   list of lines for the reader (optional)
    config  {name: value} of the run (optional)
"""

import json
import math
from pathlib import Path

TITLES = {
    "base": "base",
    "coldstart": "cold start",
    "coldstart_agto": "cold start + AGTO",
    "avar": "AVAR (GRPO, VARS)",
}


def read(path: Path | str) -> dict:
    """results.json of a run, given the file or the run's folder.

    Raises FileNotFoundError or ValueError, naming the file, where there is none or it is no JSON.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "report" / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; the last stage of a run writes it (--stages report)")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def title(stage: dict | str) -> str:
    """A stage's name as a reader sees it."""
    name = stage if isinstance(stage, str) else stage["name"]
    return TITLES.get(name, name)


def number(record: dict | None, *keys: str) -> float | None:
    """The figure at `keys`; None where it was not measured or is not finite."""
    for key in keys:
        record = (record or {}).get(key)
    return record if record is not None and math.isfinite(record) else None


def check(results: dict) -> None:
    """Raises ValueError with the place of the first thing that is not as the schema says."""
    if not results.get("stages"):
        raise ValueError("results.json has no 'stages': nothing was evaluated, run the evaluation stage first")
    for index, stage in enumerate(results["stages"]):
        if "name" not in stage or number(stage, "accuracy", "all") is None:
            raise ValueError(f"results.json: stages[{index}] needs 'name' and 'accuracy' with an entry 'all'")
    for index, row in enumerate(results.get("rl") or []):
        if "step" not in row:
            raise ValueError(f"results.json: rl[{index}] needs 'step'")


def tasks(results: dict) -> list[str]:
    """Names of the tasks, "all" first."""
    found = {task: None for stage in results["stages"] for task in stage["accuracy"]}
    return ["all", *(task for task in found if task != "all")]


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def digits(value: float | None) -> str:
    if value is None:
        return "–"
    if value >= 1000:
        return f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"
    return f"{value:#.3g}".rstrip(".")
