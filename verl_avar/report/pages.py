"""Pages that need no network: one template each beside this file, pictures embedded as data URIs."""

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from verl_avar.report.heatmaps import LARGEST, SHORTEST, SIDE, brightest, picture_size, veil
from verl_avar.report.results import digits, percent, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from verl_avar.report.report import HeatmapSample

CARD, LARGEST_CARD = 152, 736  # CSS pixels: least width of a card, and of one with a fine grid or a wide image


def write_page(template: str, page: Path, **context: Any) -> Path:
    """Renders a template of this folder to `page`, which is complete or absent at any time; returns it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    html = environment.get_template(template).render(**context)
    unfinished = page.with_suffix(".tmp")
    unfinished.write_text(html, encoding="utf-8")
    unfinished.replace(page)
    return page


def save_figures(drawn: "dict[str, Figure | None]", folder: Path) -> dict[str, str]:
    """Writes NAME.png for each figure there is; returns them embedded."""
    folder.mkdir(parents=True, exist_ok=True)
    embedded = {}
    for name, figure in drawn.items():
        if figure is not None:
            figure.savefig(folder / f"{name}.png")
            embedded[name] = data_uri((folder / f"{name}.png").read_bytes())
    return embedded


def heatmap_cards(sample: "HeatmapSample") -> dict:
    """What looks.html needs of one sample: its image once, and each step's veil, which the browser lays over it."""
    top = brightest(sample)
    cards = [{"veil": None, "text": "the image", "mass": None}]
    for text, weights in sample.steps:
        mask = data_uri(_encoded(veil(weights, top), "PNG"))
        cards.append({"veil": mask, "text": text.strip(), "mass": percent(float(weights.sum()))})
    rows, columns = sample.steps[0][1].shape if sample.steps else (1, 1)
    aspect = sample.image.width / sample.image.height
    width = min(max(CARD, 7 * columns, 7 * rows * aspect, SHORTEST * aspect), LARGEST_CARD)
    picture, format_ = sample.image.convert("RGB"), "PNG"
    if max(picture.size) > SIDE:
        picture, format_ = _shrunk(picture, (rows, columns)), "JPEG"
    return {
        "question": sample.question,
        "truth": sample.truth,
        "stage": title(sample.stage),
        "image": data_uri(_encoded(picture, format_), format_.lower()),
        "pixels": format_ == "PNG",  # small images are enlarged as they are
        "aspect": f"{aspect:.4f}",
        "width": round(width),
        "cards": cards,
        "top": digits(100 * top),
    }


def data_uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()


def _shrunk(picture: "Image", grid: tuple[int, int]) -> "Image":
    width, height = picture_size(picture, grid)
    scale = min(2.0, LARGEST / max(width, height))  # twice the pixels, for dense screens
    width, height = round(width * scale), round(height * scale)
    return picture if width >= picture.width else picture.resize((max(1, width), max(1, height)))


def _encoded(image: "Image", format_: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, quality=88)
    return buffer.getvalue()
