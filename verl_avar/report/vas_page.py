"""The page of `avar vas`: what was seen, the table, the figures, and where responses look. Needs no network."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from verl_avar.report.results import digits, percent
from verl_avar.report.vas_results import SCOPES, scopes_of, series
from verl_avar.report.vas_table import checked, extent, print_vas, table_rows
from verl_avar.report.vas_verdicts import vas_verdicts, worth_naming

if TYPE_CHECKING:
    from verl_avar.report.report import HeatmapSample

HEADS = 8  # strongest heads listed
REASONS = 20  # reasons of failures listed

__all__ = ["print_vas", "render_vas"]


def render_vas(result: dict, overlays: "Sequence[HeatmapSample]", out: Path, others: Sequence[dict] = ()) -> Path:
    """Writes `out/index.html` and, beside it, `figures/*.png`; returns the page's path.

    others: results to compare with, the first of them as the base. Raises ValueError where a result is not as
    vas_results.py says; nothing is written then.
    """
    from verl_avar.report import vas_figures
    from verl_avar.report.drawing import literal
    from verl_avar.report.heatmaps import heatmap_sheet
    from verl_avar.report.pages import heatmap_cards, save_figures, write_page

    results = [*others, result]
    names = checked(results, None)
    heads, body = table_rows(results, names)
    written = [literal(name) for name in names]
    drawn = {
        "masses": vas_figures.masses(results, written),
        "robustness": vas_figures.robustness(results, written),
        "by_layer": vas_figures.by_layer(results, written),
        **{f"heads_{scope}": vas_figures.head_map(result, scope) for scope in reversed(scopes_of([result]))},
        "by_position": vas_figures.by_position(results, written),
    }
    folder = Path(out) / "figures"
    for stale in folder.glob("*.png"):  # an earlier page may have had more samples
        stale.unlink()
    embedded = save_figures(drawn, folder)
    save_figures({f"heatmap_{n}": heatmap_sheet(sample) for n, sample in enumerate(overlays, start=1)}, folder)
    return write_page(
        "vas_page.html",
        Path(out) / "index.html",
        name=names[-1],
        data=result.get("data"),
        extent=extent(result),
        verdicts=vas_verdicts(results, names),
        notes=worth_naming(results, names),
        heads=heads,
        body=body,
        figures=embedded,
        strongest={SCOPES[scope]: rows for scope in scopes_of([result]) if (rows := strongest_heads(result, scope))},
        failures=failures(result),
        samples=[heatmap_cards(sample) for sample in overlays],
        settings=settings(result),
    )


def strongest_heads(result: dict, scope: str) -> list[list[str]]:
    """Layer, head, image %, system turn % and VAS of the heads that look most; empty where heads were not measured or
    are all the same."""
    tables = [series(result, "scopes", scope, "by_head", key) for key in ("visual", "system", "vas")]
    visual = tables[0]
    if visual is None or visual.size < 2 or result.get("cross_attention"):
        return []
    order = np.argsort(-np.nan_to_num(visual, nan=-1), axis=None, kind="stable")[:HEADS]
    formats = (percent, percent, digits)
    rows = []
    for layer, head in zip(*np.unravel_index(order, visual.shape), strict=True):
        values = [None if table is None else float(table[layer, head]) for table in tables]
        cells = [form(value if value == value else None) for form, value in zip(formats, values, strict=True)]
        rows.append([str(result["layers"][layer]), str(head), *cells])
    return rows


def failures(result: dict) -> list[tuple[str, int, str]]:
    """(reason, how many rows, the first few of them), most frequent first; of failed and of skipped rows."""
    rows: dict[str, list[str]] = {}
    for entry in [*(result.get("failed") or []), *(result.get("skipped") or [])]:
        rows.setdefault(str(entry["reason"]), []).append(str(entry["row"]))
    ordered = sorted(rows.items(), key=lambda item: -len(item[1]))
    listed = [(reason, len(ids), ", ".join(ids[:5]) + ", …" * (len(ids) > 5)) for reason, ids in ordered]
    if len(listed) > REASONS:
        left = listed[REASONS - 1 :]
        listed[REASONS - 1 :] = [(f"{len(left)} other reasons", sum(count for _, count, _ in left), "")]
    return listed


def settings(result: dict) -> dict[str, str]:
    """What was measured, for the page's foot."""
    layers = [str(layer) for layer in result["layers"]]
    seconds = result.get("seconds")
    known = {
        "model": result["model"],
        "architecture": result.get("model_type"),
        "data": result.get("data"),
        "number format": result.get("dtype"),
        "layers": ", ".join(layers),
        "heads": result["heads"],
        "rows": f"{result['samples']} of {result.get('planned', result['samples'])}",
        "time": None if seconds is None else f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s",
    }
    for scope in scopes_of([result]):
        if (share := (result["scopes"][scope].get("sinks") or {}).get("share")) is not None:
            known["sink"] = (
                f"an image token with over {percent(share)} % of the attention to the image, far above an even part"
            )
    return {name: str(value) for name, value in known.items() if value is not None}
