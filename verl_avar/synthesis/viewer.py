"""The page on which a person judges a run's rows: OUT/viewer/index.html, one file that needs no network.

Everything on it that models or sources wrote is escaped, and a content security policy forbids whatever the page did
not bring itself: scripts but its own, and every address.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from verl_avar.data.schema import IMAGE
from verl_avar.synthesis.joined import joined, key, outcomes
from verl_avar.synthesis.outcomes import ACCEPTED, STAGES, TEXTS
from verl_avar.synthesis.samples import choose, divided

LONGEST = 640  # pixels of an image's longer side on the page: figures in it stay readable, sixty fit into some MB
TITLES = {"describe": "1. Description", "reason": "2. Reasoning", "anchor": "3. Anchored"}
# Without it the page shows every sample; with it, those of the chosen status, reason and source.
SCRIPT = """
const samples = [...document.querySelectorAll(".sample")], choices = [...document.querySelectorAll("#filter select")];
const shown = document.getElementById("shown");
function filter() {
  const wanted = choices.filter(c => c.value);
  for (const s of samples) s.hidden = wanted.some(c => s.dataset[c.name] !== c.value);
  shown.textContent = samples.filter(s => !s.hidden).length + " of " + samples.length + " samples";
}
for (const c of choices) c.addEventListener("change", filter);
document.addEventListener("keydown", e => {
  if (!"jk".includes(e.key) || e.ctrlKey || e.metaKey || e.altKey || e.target.matches("select")) return;
  const visible = samples.filter(s => !s.hidden), top = s => s.getBoundingClientRect().top;
  const next = e.key === "j" ? visible.find(s => top(s) > 80) : visible.filter(s => top(s) < -5).pop();
  if (next) next.scrollIntoView();
});
document.getElementById("filter").hidden = false;
filter();
"""


def write_viewer(config: Any, out: Path, explain: Mapping[str, str] | None = None) -> Path:
    """Writes the page of `config.viewer_rows` samples of a run's folder; returns its path.

    explain: what the reason codes mean; by default the checks' own REASONS. Images are on the page, shrunk.
    """
    from markupsafe import Markup

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
        script=Markup(SCRIPT),
        script_hash=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
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
        "question": _question(row["question"]) if row else None,
        "choices": [(chr(ord("A") + index), text) for index, text in enumerate(row["choices"])] if row else [],
        "answer": row["answer"] if row else None,
        "images": [_picture(image["bytes"]) for image in row["images"]] if row else [],
        "stages": stages,
        "candidates": tried,
    }


def _question(text: str) -> list[tuple[str, str]]:
    """Pieces of a question, each of several placeholders the number of its image."""
    first, *others = text.split(IMAGE)
    if len(others) == 1:
        return [("text", (first + others[0]).strip())]
    numbered = [piece for n, part in enumerate(others, start=1) for piece in (("tag", f"image {n}"), ("text", part))]
    return [("text", first), *numbered]


def _picture(image: bytes) -> dict:
    """A data URI of an image, no side longer than LONGEST, and its size as it was."""
    from PIL import Image

    from verl_avar.report.pages import data_uri

    with Image.open(io.BytesIO(image)) as picture:
        size = picture.size
        small = max(size) <= LONGEST
        if small and len(image) <= 100_000 and picture.format in ("PNG", "JPEG", "WEBP"):
            return {"uri": data_uri(image, picture.format.lower()), "width": size[0], "height": size[1]}
        flat = Image.new("RGB", size, "white")  # JPEG has no transparency; drawings are often black on nothing
        flat.paste(picture, mask=picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None)
    flat.thumbnail((LONGEST, LONGEST))
    buffer = io.BytesIO()
    flat.save(buffer, "JPEG", quality=85)
    return {"uri": data_uri(buffer.getvalue(), "jpeg"), "width": size[0], "height": size[1]}
