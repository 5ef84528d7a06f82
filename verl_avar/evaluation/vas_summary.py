"""The summary of measured samples: `vas.json`, and the table per sample × scope × layer × head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from verl_avar.vas import SampleVas, Vas, vas_class

ROLES = ("visual", "system", "user", "response")
RESAMPLES = 2000


def summarise(table: pd.DataFrame, *, classes: bool, sink_share: float, seed: int = 0) -> dict:
    """`scopes`, `positions` and `decay` of vas.json from the records of all parts (see measure.py).

    classes: whether the paper's classes apply (self-attention models).
    """
    scopes = {}
    for name in ("user", "response"):
        if len(part := table[table["scope"] == name]):
            scopes[name] = _scope(part, classes and name == "user", sink_share, seed)
    response = table[table["scope"] == "response"]
    return {"scopes": scopes, "positions": _positions(response), "decay": _decay(response)}


def by_head(table: pd.DataFrame) -> pd.DataFrame:
    """One row per sample × scope × layer × head."""
    frames = []
    for record in table.to_dict("records"):
        layers, heads = np.array(record["layers"]), record["heads"]
        columns = {
            "number": record["number"],
            "id": record["id"],
            "scope": record["scope"],
            "layer": np.repeat(layers, heads),
            "head": np.tile(np.arange(heads), len(layers)),
            "queries": record["queries"],
            "vas": np.nan if record["vas"] is None else np.array(record["vas"]),
        }
        frames.append(pd.DataFrame(columns | {f"{role}_mass": np.array(record[role]) for role in ROLES}))
    return pd.concat(frames, ignore_index=True)


def _scope(part: pd.DataFrame, classed: bool, sink_share: float, seed: int) -> dict:
    layers, heads = len(part["layers"].iloc[0]), int(part["heads"].iloc[0])

    def grid(values) -> torch.Tensor:
        return torch.tensor(np.array(values), dtype=torch.float64).view(layers, heads)

    vas, scored = Vas(str(part["scope"].iloc[0])), part[part["vas"].notna()]
    for record in scored.to_dict("records"):
        vas.add_sample(
            SampleVas(
                record["queries"],
                torch.tensor(np.array(record["reached"]), dtype=torch.float64),
                grid(record["vas"]),
                grid(record["visual"]),
                grid(record["system"]),
                torch.tensor(np.array(record["head_mean"]), dtype=torch.float64),
                torch.tensor(np.array(record["by_query"]), dtype=torch.float64),
            )
        )
    weights = part["queries"].to_numpy(float)
    heads_mass = {
        role: np.average(np.stack(part[role].map(np.array)), axis=0, weights=weights).reshape(layers, heads)
        for role in ROLES
    }
    summary = vas.summary() if vas.queries else {"paper": None, "head_mean": None, "median": None, "by_layer": None}
    paper = vas.by_head if vas.queries else None
    reached = [np.array(r) for r in scored["reached"]]
    of_heads = [np.array(v).reshape(layers, heads).mean(1) for v in scored["vas"]]
    found = {
        "vas": summary["paper"],
        "class": vas_class(summary["paper"]) if classed and vas.queries else None,
        "interval": _interval(of_heads, reached, seed),
        "head_mean": summary["head_mean"],
        "head_mean_interval": _interval(list(map(np.array, scored["head_mean"])), reached, seed),
        "median": summary["median"],
        "mass": {role: float(mass.mean()) for role, mass in heads_mass.items()},
        "by_layer": {
            "vas": None if paper is None else paper.mean(1).tolist(),
            "head_mean": summary["by_layer"],
            "visual": heads_mass["visual"].mean(1).tolist(),
            "system": heads_mass["system"].mean(1).tolist(),
        },
        "by_head": {
            "vas": None if paper is None else paper.tolist(),
            "visual": heads_mass["visual"].tolist(),
            "system": heads_mass["system"].tolist(),
        },
        "samples": len(scored),
        "skipped": len(part) - len(scored),
        "queries": int(part["queries"].sum()),
        "sinks": _sinks(part, sink_share),
    }
    return _plain(found)


def _plain(value):
    """None for what is not a number: a layer without a VAS."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _sinks(part: pd.DataFrame, share: float) -> dict | None:
    """Means over the samples (each by its queries) of the figures without sinks and without border tokens."""
    if "sink_share" not in part or part["sink_share"].isna().all():
        return None

    def mean(column: str) -> float | None:
        if column not in part:
            return None
        known = part[part[column].notna()]
        return float(np.average(known[column], weights=known["queries"])) if len(known) else None

    return {
        "share": share,
        "tokens": mean("sink_tokens"),
        "mass_share": mean("sink_share"),
        "vas": mean("sink_free_vas"),
        "head_mean": mean("sink_free_head_mean"),
        "visual": mean("sink_free_visual"),
        "border_share": mean("border_share"),
        "no_border_vas": mean("border_free_vas"),
        "no_border_head_mean": mean("border_free_head_mean"),
        "no_border_visual": mean("border_free_visual"),
    }


def _positions(response: pd.DataFrame) -> dict | None:
    """Mean masses by position in the response, over the samples that reach it."""
    if response.empty:
        return None
    longest = int(response["queries"].max())
    sums, count = np.zeros((len(ROLES), longest)), np.zeros(longest, dtype=int)
    for positions in response["positions"]:
        values = np.stack([np.array(row) for row in positions])
        sums[:, : values.shape[1]] += values
        count[: values.shape[1]] += 1
    ratios, scored = np.zeros(longest), np.zeros(longest, dtype=int)
    for values in map(np.array, response["by_query"].dropna()):
        ratios[: len(values)] += np.nan_to_num(values)
        scored[: len(values)] += ~np.isnan(values)
    return {
        "position": list(range(longest)),
        "n": count.tolist(),
        **{role: (row / count).tolist() for role, row in zip(ROLES, sums, strict=True)},
        "head_mean": [float(r / n) if n else None for r, n in zip(ratios, scored, strict=True)],
    }


def _decay(response: pd.DataFrame) -> dict | None:
    """Visual mass in the first and the last quarter of the responses of at least eight tokens; its slope per 100 tokens
    where there are responses of half that length.
    """
    first, last, slopes = [], [], []
    for positions in response["positions"] if len(response) else ():
        visual = np.array(positions[0])
        if len(visual) < 8:
            continue
        quarter = len(visual) // 4
        first.append(visual[:quarter].mean())
        last.append(visual[-quarter:].mean())
        if len(visual) >= 50:
            slopes.append(100 * np.polyfit(np.arange(len(visual)), visual, 1)[0])
    if not first:
        return None
    slope = float(np.mean(slopes)) if slopes else None
    return {"first": float(np.mean(first)), "last": float(np.mean(last)), "slope_per_100": slope}


def _interval(values: Sequence, reached: Sequence, seed: int) -> list[float] | None:
    """95 % percentile bootstrap interval, over samples, of the VAS that they make together; None for fewer than two.

    values: [S, L], each sample's mean over heads by layer, NaN where it has none; reached: [S, L], the queries behind.
    """
    if len(values) < 2:
        return None
    values, reached = np.stack(values), np.stack(reached)
    sums, n = np.concatenate([np.nan_to_num(values) * reached, reached], axis=1), len(values)
    rng = np.random.default_rng(seed)
    drawn = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) @ sums for _ in range(RESAMPLES)])
    ratios, counts = np.split(drawn, 2, axis=1)
    means = np.nanmean(np.divide(ratios, counts, out=np.full_like(ratios, np.nan), where=counts > 0), axis=1)
    return np.quantile(means, [0.025, 0.975]).tolist()
