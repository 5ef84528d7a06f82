"""The card of a synthesised data set: README.md with the head that the Hugging Face hub reads, and its figures.

It is meant to be given away with the rows: no path of the machine it was written on, no address but the hosts of the
endpoints, and no key, which the settings don't hold anyway.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from verl_avar.synthesis.joined import summary_of
from verl_avar.synthesis.outcomes import STAGES
from verl_avar.synthesis.outputs import TARGETS
from verl_avar.synthesis.samples import ORDER
from verl_avar.synthesis.viewer import explanations

CARD = "README.md"
FIGURES = {
    "rejects": "Rejected rows by reason, coloured by stage.",
    "chain_length": "Words of the accepted chains before and after anchoring (Chinese, Japanese, Korean: signs).",
    "anchors_per_chain": "Looks at the image in each accepted chain.",
    "anchor_positions": "Where in the accepted chains the looks at the image begin.",
    "attention": "The student's attention to the image over each chain.",
}
FILES = {
    "sft": ("supervised fine-tuning", "verl's MultiTurnSFTDataset"),
    "rl": ("reinforcement learning: the prompts of the accepted rows", "verl's RLHFDataset"),
    "sharegpt": ("supervised fine-tuning", "LLaMA-Factory (`dataset_dir`)"),
    "dataset": ("anything: rows with the texts of all three stages", "`datasets.load_dataset`"),
}
ATTENTION = {"attention": "attention to the image", "words": "words of the chain", "anchors": "looks at the image"}


def write_card(config: Any, out: Path, summary: dict | None = None, explain: Mapping[str, str] | None = None) -> Path:
    """Writes OUT/README.md and OUT/figures/*.png, and both into OUT/dataset where that is; returns the card's path.

    summary: the run's figures; by default those of summary.json. A figure of attention is drawn by the selection.
    explain: what the reason codes mean; by default the checks' own REASONS.
    """
    from verl_avar.report.pages import save_figures
    from verl_avar.report.synthesis_figures import figures
    from verl_avar.synthesis.distributions import distributions

    out = Path(out)
    summary = summary_of(out) if summary is None else summary
    for name in FIGURES:  # an earlier run may have had more of them
        if name != "attention" or not summary.get("attention"):
            (out / "figures" / f"{name}.png").unlink(missing_ok=True)
    save_figures(figures(distributions(out), summary["reasons"]), out / "figures")
    drawn = [name for name in FIGURES if (out / "figures" / f"{name}.png").is_file()]
    for folder in (out, out / TARGETS["dataset"]):
        if folder.is_dir():
            unfinished = folder / f".{CARD}.tmp"
            card(config, summary, drawn, folder != out, explanations(explain), out).save(unfinished)
            unfinished.replace(folder / CARD)
    if (out / TARGETS["dataset"]).is_dir():
        beside = out / TARGETS["dataset"] / "figures"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        for name in drawn:
            shutil.copy(out / "figures" / f"{name}.png", beside)
    return out / CARD


def card(
    config: Any, summary: dict, drawn: list[str], alone: bool, explain: Mapping[str, str], out: Path
):  # -> huggingface_hub.DatasetCard
    """The card. drawn: names of the figures there are; alone: for the plain data set's folder, without the others."""
    import jinja2
    from huggingface_hub import DatasetCard, DatasetCardData

    from verl_avar.report.model_card import cell

    there = [name for name in TARGETS if (out / TARGETS[name]).exists() and (not alone or name == "dataset")]
    plain = "data/*.parquet" if alone else "dataset/data/*.parquet"
    data = DatasetCardData(
        task_categories=["image-text-to-text"],
        tags=["avar", "synthetic", "visual-reasoning"],
        size_categories=size_category(summary["accepted"]),
        source_datasets=hub_names(config) or None,
        configs=[{"config_name": "default", "data_files": plain}] if "dataset" in there else None,
    )
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"cell": cell, "count": "{:,}".format, "share": share, "shown": shown}
    template = Path(__file__).parent.parent / "report" / "synthesis_card.md"
    stages = [stage_facts(name, summary["stages"][name], config) for name in STAGES if name in summary["stages"]]
    text = environment.from_string(template.read_text(encoding="utf-8")).render(
        summary=summary,
        files=[("." if alone else TARGETS[name], *FILES[name]) for name in there],
        figures=[(name, what) for name, what in FIGURES.items() if name in drawn],
        reasons=reason_rows(summary["reasons"], explain),
        stages=stages,
        table=stage_table(stages),
        cost=any(stage["cost"] for stage in stages),
        seconds=None if summary.get("seconds") is None else duration(summary["seconds"]),
        system=config.system,
        attention=summary.get("attention"),
        changes=attention_table(summary.get("attention")),
        overlap=bool(config.overlap.benchmarks or config.overlap.hashes),
        near=config.duplicates.near,
    )  # fmt: skip
    text = re.sub(r"\n{3,}", "\n\n", text)
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def stage_facts(name: str, stage: dict, config: Any) -> dict:
    """One stage of summary.json as the card states it."""
    return stage | {
        "name": name,
        "model": shown(stage["model"]),
        "endpoint": urlsplit(stage["endpoint"]).hostname or "not recorded",
        "prompt": prompt(name, stage, config.stages[name].prompt),
    }


def prompt(name: str, stage: dict, file: str | None) -> dict:
    """Name, hash and text of a stage's template; no text where it is not the one that the run used."""
    path = Path(file).expanduser() if file else Path(__file__).parent / "prompts" / f"{name}.jinja"
    known = {"name": path.name if file else "built in", "sha256": stage["prompt_sha256"], "text": None, "why": ""}
    if not path.is_file():
        return known | {"why": "The template was not there when this card was written."}
    content = path.read_text(encoding="utf-8")
    if hashlib.sha256(content.encode()).hexdigest() != stage["prompt_sha256"]:
        return known | {"why": "The template has been changed since the run, so that its text is not shown."}
    return known | {"text": content}


def stage_table(stages: list[dict]) -> list[tuple[str, list[str]]]:
    """Lines (what, its value for each stage)."""
    kept = {"first": "the first", "shortest": "the shortest", "longest": "the longest",
            "most_anchors": "the one with most anchors", "attention": "the one with most attention"}  # fmt: skip
    lines = {
        "model": lambda s: s["model"],
        "endpoint": lambda s: s["endpoint"],
        "sampling": lambda s: ", ".join(f"{k} {json.dumps(v)}" for k, v in s["sampling"].items()) or "the server's",
        "candidates": lambda s: (
            f"{s['candidates']}, of which {kept[s['keep']]} that passes is kept" if s["candidates"] > 1 else "1"
        ),
        "answered calls": lambda s: f"{s['calls']:,}",
        "retries": lambda s: ", ".join(f"{n:,} × {kind}" for kind, n in s["retries"].items() if n) or "0",
        "prompt tokens": lambda s: f"{s['prompt_tokens']:,}",
        "completion tokens": lambda s: f"{s['completion_tokens']:,}",
        "cost": lambda s: f"{s['cost']:,.2f}" if s["cost"] >= 0.01 or not s["cost"] else f"{s['cost']:.2g}",
    }
    return [(what, [value(stage) for stage in stages]) for what, value in lines.items()
            if what != "cost" or any(stage["cost"] for stage in stages)]  # fmt: skip


def reason_rows(reasons: Mapping[str, Mapping[str, int]], explain: Mapping[str, str]) -> list[tuple]:
    """(stage, reason, rows, explanation) in the order of the stages, frequent reasons first."""
    order = [*ORDER, *sorted(set(reasons) - set(ORDER))]
    return [
        (stage, reason, rows, explain.get(reason, ""))
        for stage in order
        for reason, rows in sorted(reasons.get(stage, {}).items(), key=lambda one: (-one[1], one[0]))
        if rows
    ]


def attention_table(attention: dict | None) -> list[list[str]]:
    """What selection changed (selection.py, `report`): what, mean before, mean after, difference with its interval."""
    lines = []
    for key, what in ATTENTION.items():
        if part := (attention or {}).get(key):
            form = ("{:.4f}" if key == "attention" else "{:.1f}").format
            between = f" [{form(part['interval'][0])}, {form(part['interval'][1])}]" if part.get("interval") else ""
            means = [form(part[when]["mean"]) for when in ("before", "after")]
            lines.append([what, *means, form(part["difference"]) + between])
    return lines


def hub_names(config: Any) -> list[str]:
    """Sources that are data sets on the hub, by their form: OWNER/NAME and no such path here."""
    paths = dict.fromkeys(source.path for source in config.sources)
    return [path for path in paths if re.fullmatch(r"\w[\w.-]*/[\w.-]+", path) and not Path(path).exists()]


def shown(name: str) -> str:
    """The name of a model or a source without the folders of this machine."""
    local = name.startswith((".", "/", "~")) or re.match(r"[A-Za-z]:\\", name) or name.count("/") > 1
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] if local else name


def share(part: int, whole: int) -> str:
    """In percent."""
    return f"{100 * part / whole:.1f}" if whole else "–"


def duration(seconds: float) -> str:
    """Seconds for a person."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def size_category(rows: int) -> str:
    """The hub's name for a number of rows."""
    bounds = {1e3: "n<1K", 1e4: "1K<n<10K", 1e5: "10K<n<100K", 1e6: "100K<n<1M"}
    return next((name for bound, name in bounds.items() if rows < bound), "1M<n<10M")
