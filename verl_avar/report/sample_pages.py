"""What pages share that show a person single samples: their script, their images, and the numbers of these."""

from __future__ import annotations

import base64
import hashlib
import io
from typing import Any

from verl_avar.data.schema import IMAGE

LONGEST = 640  # pixels of an image's longer side on the page: figures in it stay readable, sixty fit into some MB
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


def scripted(script: str) -> dict[str, Any]:
    """What a template needs of its script: `script`, and `script_hash`, by which the page's policy allows it alone."""
    from markupsafe import Markup

    return {
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }


def numbered(text: str) -> list[tuple[str, str]]:
    """Pieces of a question, each placeholder the number of its image."""
    first, *others = text.split(IMAGE)
    if len(others) == 1:
        return [("text", (first + others[0]).strip())]
    numbered = [piece for n, part in enumerate(others, start=1) for piece in (("tag", f"image {n}"), ("text", part))]
    return [("text", first), *numbered]


def embedded(image: bytes) -> dict:
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
