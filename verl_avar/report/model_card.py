"""The model card of an exported checkpoint: README.md in its folder, with the head that the Hugging Face hub reads.

What was not recorded or not measured is said to be so. The card names no path of the machine it was written on: a model
folder is meant to be given away.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from huggingface_hub import ModelCard, ModelCardData

from verl_avar.report.results import digits, number, percent, tasks, title

CARD = "README.md"
TEMPLATE = Path(__file__).with_name("model_card.md")


@dataclass(frozen=True)
class Rows:
    """One file of rows. None: not known."""

    use: str  # what they were for, such as "cold start"
    origin: str  # where they come from: sources, or the name of a file
    count: int | None
    conversion: str | None = None  # what converting them counted, in one line
    hub: tuple[str, ...] = ()  # names of data sets on the hub among the sources
    system: dict[str | None, int] | None = None  # rows of each system turn; the key None: rows without one


@dataclass(frozen=True)
class Stage:
    """A training stage that led to the checkpoint."""

    name: str  # as in results.json
    settings: dict[str, str]
    packages: dict[str, str] | None = None  # versions at its last start; None: not recorded


@dataclass(frozen=True)
class Facts:
    """What a card states beside the figures."""

    run: str
    stage: str  # name of the checkpoint in results.json
    base: str  # a hub name, or what it is in words
    stages: list[Stage]  # from the base to this checkpoint
    rows: list[Rows]
    evaluation: str  # how the figures were made, in one line
    base_on_hub: bool = False
    base_license: dict[str, str] = field(default_factory=dict)  # license… of the base's own card, where it was found


def write_card(folder: Path, facts: Facts, results: dict) -> Path:
    """Writes the card into an exported model's folder, whole or not at all; returns its path.

    results: results.json of the run (its schema: results.py). Without the checkpoint's figures the card says so.
    """
    path = folder / CARD
    unfinished = folder / f".{CARD}.tmp"
    card(facts, results).save(unfinished)
    unfinished.replace(path)
    return path


def card(facts: Facts, results: dict) -> ModelCard:
    """The card of one checkpoint."""
    data = ModelCardData(
        base_model=facts.base if facts.base_on_hub else None,
        datasets=list(dict.fromkeys(name for rows in facts.rows for name in rows.hub)) or None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["avar", "verl"],
        **facts.base_license,
    )
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"cell": cell, "title_": title}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    measured = {stage["name"]: stage for stage in results.get("stages") or []}
    text = template.render(
        facts=facts,
        name=shlex.quote(f"{facts.run}-{facts.stage}".replace("/", "-")),
        heads=[title(name) for name in ("base", facts.stage) if name in measured],
        figures=figures(results, [measured[name] for name in ("base", facts.stage) if name in measured]),
        measured=measured,
        turns=system_turns(facts.rows),
        samples=measured.get(facts.stage, {}).get("samples"),
        dtype=measured.get(facts.stage, {}).get("dtype"),
    )
    text = re.sub(r"\n{3,}", "\n\n", text)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def figures(results: dict, stages: list[dict]) -> list[tuple[str, list[str]]]:
    """Lines of the table: (what, its figure for each of `stages`)."""
    names = tasks({"stages": stages})
    if len(names) == 2:  # a single task is what "all" is
        names = names[:1]
    ways = (("accuracy", "accuracy"), ("shuffled", "accuracy with the images of other rows"))
    lines = [
        (label + (", %" if name == "all" else f", {name}, %"), [percent(number(stage, key, name)) for stage in stages])
        for key, label in ways
        for name in names
    ]
    for scope, whose in (("response", "response"), ("user", "user turn")):
        for key, how in (("head_mean", "head-averaged"), ("paper", "the paper's")):
            lines.append((f"VAS of the {whose}, {how}", [digits(number(stage, "vas", scope, key)) for stage in stages]))
    for key, what in (("visual", "image"), ("system", "system turn")):
        lines.append(
            (f"attention of the response to the {what}, %", [percent(number(stage, "mass", key)) for stage in stages])
        )
    return lines


def system_turns(rows: list[Rows]) -> list[tuple[str, str | None]]:
    """(whose rows, the most frequent system turn of them), each turn once; None: no system turn."""
    uses: dict[str | None, list[str]] = {}
    for part in rows:
        if part.system:
            text, count = max(part.system.items(), key=lambda turn: turn[1])
            total = sum(part.system.values())
            uses.setdefault(text, []).append(part.use if count == total else f"{part.use} ({count:,} of {total:,})")
    return [(", ".join(names), text) for text, names in uses.items()]


def cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return " ".join(str(text).split()).replace("\\", "\\\\").replace("|", "\\|")
