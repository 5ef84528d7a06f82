"""Renders `results.json` of a run as a table on the terminal and as one page that needs no network.

The schema of `results` is in results.py.
"""

from collections.abc import Sequence
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


def render(
    results: dict,
    out_dir: Path,
    samples: list[HeatmapSample] | None = None,
    links: Sequence[tuple[str, Path]] = (),
) -> Path:
    """Writes `out_dir/report/index.html` and, beside it, `figures/*.png`; returns the page's path.

    links: (title, page) of pages below `out_dir/report` that it links to.

    Raises ValueError when `results` is not as the module's schema says; nothing is written then.
    """
    from verl_avar.report import figures
    from verl_avar.report.heatmaps import heatmap_sheet
    from verl_avar.report.pages import heatmap_cards, save_figures, write_page

    check(results)
    page = Path(out_dir) / "report" / "index.html"
    folder = page.parent / "figures"
    drawn = {
        "accuracy": figures.accuracy(results),
        "vas": figures.vas(results),
        "mass": figures.mass(results),
        "rl": figures.rl(results),
    }
    embedded = save_figures(drawn, folder)
    save_figures({f"heatmap_{n}": heatmap_sheet(sample) for n, sample in enumerate(samples or [], start=1)}, folder)
    heads, cells = rows(results)
    return write_page(
        "page.html",
        page,
        verdicts=verdicts(results),
        heads=heads,
        rows=cells,
        figures=embedded,
        samples=[heatmap_cards(sample) for sample in samples or []],
        notes=results.get("notes") or [],
        config=results.get("config") or {},
        links=[(name, Path(linked).relative_to(page.parent).as_posix()) for name, linked in links],
    )
