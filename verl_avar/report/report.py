"""Renders `results.json` of a run as a table on the terminal and as one page that needs no network.

The schema of `results` is in results.py.
"""

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from verl_avar.report.results import check, digits, number, percent, tasks, title
from verl_avar.report.verdicts import verdicts

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from rich.console import Console


@dataclass(frozen=True)
class HeatmapSample:
    """Where one response looks, step by step.

    `steps` holds the response cut in pieces, each with its attention to the image's cells: an array [rows, columns]
    in [0, 1], the mean over the piece's tokens, layers and heads, which sums to the piece's visual mass.
    """

    image: "Image"
    question: str
    steps: list[tuple[str, "np.ndarray"]]
    stage: str = ""
    truth: str = ""


def rows(results: dict) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the table that the terminal and the page both show."""
    names = tasks(results)
    heads = ["stage", *(f"{name} %" for name in names), "shuffled %", "VAS response", "VAS user", "paper's VAS, user"]
    heads += ["visual mass", "system mass", "time"]
    table = []
    for stage in results["stages"]:
        seconds = number(stage, "seconds")
        table.append(
            [
                title(stage),
                *(percent(number(stage, "accuracy", name)) for name in names),
                percent(number(stage, "shuffled", "all")),
                digits(number(stage, "vas", "response", "head_mean")),
                digits(number(stage, "vas", "user", "head_mean")),
                digits(number(stage, "vas", "user", "paper")),
                percent(number(stage, "mass", "visual")) + " %",
                percent(number(stage, "mass", "system")) + " %",
                "–" if seconds is None else f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s",
            ]
        )
    return heads, table


def print_table(results: dict, console: "Console | None" = None) -> None:
    """Prints the table and the verdict lines; a stage a line where it fits, else a stage a column."""
    from rich.console import Console
    from rich.table import Table

    check(results)
    console = console or Console()
    heads, cells = rows(results)
    if console.width < 140:  # a terminal of 80 columns holds four stages side by side, not twelve figures
        heads, *cells = zip(*[heads, *cells], strict=True)
    table = Table(title="Accuracy and visual attention by stage")
    for index, head in enumerate(heads):
        table.add_column(head, justify="left" if index == 0 else "right")
    for line in cells:
        table.add_row(*line)
    console.print(table)
    for line in verdicts(results):
        console.print(f"• {line}", highlight=False)


def render(results: dict, out_dir: Path, samples: list[HeatmapSample] | None = None) -> Path:
    """Writes `out_dir/report/index.html` and, beside it, `figures/*.png`; returns the page's path.

    Raises ValueError when `results` is not as the module's schema says; nothing is written then.
    """
    import jinja2

    from verl_avar.report import figures

    check(results)
    page = Path(out_dir) / "report" / "index.html"
    folder = page.parent / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {
        "accuracy": figures.accuracy(results),
        "vas": figures.vas(results),
        "mass": figures.mass(results),
        "rl": figures.rl(results),
    }
    embedded = {}
    for name, figure in drawn.items():
        if figure is not None:
            figure.savefig(folder / f"{name}.png")
            embedded[name] = _data_uri((folder / f"{name}.png").read_bytes())
    shown = []
    for index, sample in enumerate(samples or [], start=1):
        figures.heatmap_sheet(sample).savefig(folder / f"heatmap_{index}.png", bbox_inches="tight")
        shown.append(_heatmap_cards(sample))
    heads, cells = rows(results)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    html = template.render(
        verdicts=verdicts(results),
        heads=heads,
        rows=cells,
        figures=embedded,
        samples=shown,
        notes=results.get("notes") or [],
        config=results.get("config") or {},
    )
    unfinished = page.with_suffix(".tmp")
    unfinished.write_text(html, encoding="utf-8")
    unfinished.replace(page)
    return page


def _heatmap_cards(sample: HeatmapSample) -> dict:
    """What the page needs of one sample: every picture with its caption."""
    from verl_avar.report.figures import attention_heatmap, brightest

    top = brightest(sample)
    cards = [{"image": _data_uri(_png(attention_heatmap(sample.image))), "text": "the image", "mass": None}]
    for text, weights in sample.steps:
        picture = attention_heatmap(sample.image, weights, top)
        cards.append({"image": _data_uri(_png(picture)), "text": text, "mass": percent(float(weights.sum()))})
    stage = title(sample.stage)
    return {"question": sample.question, "truth": sample.truth, "stage": stage, "cards": cards, "top": percent(top)}


def _png(image: "Image") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
