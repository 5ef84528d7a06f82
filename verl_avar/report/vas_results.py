"""The schema of vas.json, the results of `avar vas` for one checkpoint, and how its figures are read.

Figures that could not be measured are None (null); VAS is None without a system turn.

    schema      1
    model, model_type, data, dtype; name: what to call it, or None
    cross_attention  whether images come in that way (Llama-3.2-Vision): the visual mass is then a gate's, the same for
                     all heads and queries, and no part of one whole with the other roles' masses
    layers      indices of the measured layers;  heads: their number
    samples     rows measured, of `planned`;  failed, skipped: lists of {"row", "reason"}
    seconds     of measuring, over all runs;  notes: list of lines for the reader
    scopes      {"user" | "response": SCOPE}, see AVAR §2.2, arXiv:2603.03825
        vas, interval, class             mean of single heads' ratios, its 95 % interval, the paper's class of it
        head_mean, head_mean_interval    heads averaged before the ratio;  median: of that over queries
        mass        {"visual", "system", "user", "response"}: means over layers, heads and queries
        by_layer    {"vas", "head_mean", "visual", "system"}: lists over layers
        by_head     {"vas", "visual", "system"}: [layers][heads]
        samples, skipped (no system turn), queries
        sinks       {"share", "tokens", "mass_share", "vas", "head_mean", "visual", "border_share", "no_border_vas",
                     "no_border_head_mean", "no_border_visual"}, or None
    positions   {"position", "n", "visual", "system", "user", "response", "head_mean"}: by token of the response
    decay       {"first", "last": visual mass in the first and last quarter of the responses, "slope_per_100"}
"""

from collections.abc import Sequence
from pathlib import PurePath

import numpy as np

from verl_avar.report.results import digits, number

SCOPES = {"user": "user turn", "response": "response"}


def check_vas(result: dict) -> None:
    """Raises ValueError, naming the place, where a result is not as the schema says."""
    if result.get("schema") != 1:
        raise ValueError(f"vas.json of schema {result.get('schema')!r}; this version of avar reads schema 1")
    if missing := {"model", "layers", "heads", "samples", "scopes"} - set(result):
        raise ValueError(f"vas.json has no '{min(missing)}'")
    shape = (len(result["layers"]), result["heads"])
    for name, scope in result["scopes"].items():
        if name not in SCOPES or not isinstance(scope, dict):
            raise ValueError(f"vas.json: scopes.{name} is none of {', '.join(SCOPES)}")
        for key, values in (scope.get("by_head") or {}).items():
            if values is not None and np.shape(values) != shape:
                raise ValueError(f"vas.json: scopes.{name}.by_head.{key} is {np.shape(values)}, not {shape}")
        for key, values in (scope.get("by_layer") or {}).items():
            if values is not None and len(values) != shape[0]:
                raise ValueError(f"vas.json: scopes.{name}.by_layer.{key} has {len(values)} of {shape[0]} layers")


def scopes_of(results: Sequence[dict]) -> list[str]:
    """Scopes that any of the results has, the user's first."""
    return [scope for scope in SCOPES if any(scope in result["scopes"] for result in results)]


def main_scope(results: Sequence[dict]) -> str | None:
    """The scope to look closer at: the response where all have it, else the user turn; None where none is common."""
    return next((scope for scope in ("response", "user") if all(scope in r["scopes"] for r in results)), None)


def series(record: dict | None, *keys: str) -> np.ndarray | None:
    """The list at `keys` as float64, with NaN for None; None where there is none or nothing in it was measured."""
    for key in keys:
        record = (record or {}).get(key)
    if record is None:
        return None
    values = np.array(record, dtype=float)
    return values if np.isfinite(values).any() else None


def model_names(results: Sequence[dict]) -> list[str]:
    """A short name of each model that tells it from the others: the name that the run gave it, or as much of its path's
    end as that takes, and a number where two have the same.
    """
    paths = [
        (result["name"],) if result.get("name") else PurePath(str(result["model"])).parts or ("?",)
        for result in results
    ]
    length = 1
    while len({path[-length:] for path in paths}) < len(set(paths)):
        length += 1
    names = ["/".join(path[-length:]) for path in paths]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: index + 1].count(name)})"
        for index, name in enumerate(names)
    ]


def between(record: dict, key: str) -> list[float] | None:
    """The interval at `key`, where both its ends were measured."""
    ends = record.get(key)
    finite = ends is not None and len(ends) == 2 and all(number({"end": end}, "end") is not None for end in ends)
    return list(ends) if finite else None


def interval_text(ends: Sequence[float] | None) -> str:
    return "–" if ends is None else f"{digits(ends[0])}–{digits(ends[1])}"
