"""The page on which a person judges a run's rows: OUT/viewer/index.html, one file that needs no network.

Everything on it that models or sources wrote is escaped, and a content security policy forbids whatever the page did
not bring itself: scripts but its own, and every address.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from verl_avar.report.sample_pages import SCRIPT, embedded, numbered, scripted
from verl_avar.synthesis.joined import joined, key, outcomes
from verl_avar.synthesis.outcomes import ACCEPTED, STAGES, TEXTS
from verl_avar.synthesis.samples import choose, divided

TITLES = {"describe": "1. Description", "reason": "2. Reasoning", "anchor": "3. Anchored"}


def write_viewer(config: Any, out: Path, explain: Mapping[str, str] | None = None) -> Path:
    """Writes the page of `config.viewer_rows` samples of a run's folder; returns its path.

    explain: what the reason codes mean; by default the checks' own REASONS. Images are on the page, shrunk.
    """
    from verl_avar.report.pages import write_page

    out = Path(out)
    explain = explanations(explain)
    chosen = choose(out, config.viewer_rows, config.seed)
    order = {one: place for place, one in enumerate(chosen)}
    samples: list[dict | None] = [None] * len(order)
    for outcome, row in joined(out):
        if key(outcome) in order:
            samples[order[key(outcome)]] = _sample(outcome, row, explain)
    page = out / "viewer" / "index.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    return write_page(
        "synthesis_page.html",
        page,
        name=config.name,
        rows=Counter(outcome["status"] for outcome in outcomes(out, ["status"])),
        samples=samples,
        filters={
            what: list(dict.fromkeys(s[what] for s in samples if s[what])) for what in ("status", "reason", "source")
        },
        **scripted(SCRIPT),
    )


def explanations(explain: Mapping[str, str] | None) -> Mapping[str, str]:
    """The given explanations of reason codes, or the checks' own."""
    if explain is None:
        from verl_avar.synthesis.checks.stages import REASONS

        return REASONS
    return explain


def _sample(outcome: dict, row: dict | None, explain: Mapping[str, str]) -> dict:
    stages = []
    for stage in STAGES:
        text = outcome[TEXTS[stage]]
        anchors = outcome["anchors"] or () if stage == "anchor" else ()
        if outcome["status"] == ACCEPTED or outcome["stage"] == "attention":
            verdict = "passed"
        elif outcome["stage"] == stage:
            verdict = "rejected"
        else:
            verdict = "not reached" if text is None else "passed"
        stages.append({"title": TITLES[stage], "blocks": None if text is None else divided(text, anchors),
                       "anchors": len(anchors), "verdict": verdict})  # fmt: skip
    tried = [
        one | {"blocks": divided(one["text"] or ""), "explanation": explain.get(one["reason"])}
        for one in outcome["candidates"] or ()
    ]
    shown = ("status", "stage", "reason", "detail", "source", "source_row", "id", "calls", "prompt_tokens",
             "completion_tokens", "cost", "attention", "weight")  # fmt: skip
    return {name: outcome[name] for name in shown} | {
        "explanation": explain.get(outcome["reason"]),
        "question": numbered(row["question"]) if row else None,
        "choices": [(chr(ord("A") + index), text) for index, text in enumerate(row["choices"])] if row else [],
        "answer": row["answer"] if row else None,
        "images": [embedded(image["bytes"]) for image in row["images"]] if row else [],
        "stages": stages,
        "candidates": tried,
    }
