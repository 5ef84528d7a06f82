"""How a run's calls stand, while it runs: a bar on a terminal, some lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from verl_avar.synthesis.pipeline import Progress

LINES = 20


@contextmanager
def shown(progress: Progress, total: int, console: Console) -> Iterator[None]:
    """Shows `progress` of `total` rows on the console for as long as the context is open."""
    started = time.monotonic()

    def figures() -> str:
        rows, spent = progress.rows, progress.spent
        rate = progress.calls / max(1e-9, time.monotonic() - started)
        cost = f", cost {spent.cost:,.2f}" if spent.cost else ""
        return (
            f"accepted {rows['accepted']:,}, rejected {rows['rejected']:,}; {progress.calls:,} calls ({rate:.1f}/s), "
            f"{spent.tokens:,} tokens{cost}"
        )

    if console.is_terminal:
        columns = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Bars(*columns, TextColumn("{task.fields[figures]}"), console=console) as bars:
            bar = bars.add_task("rows", total=total, figures="")
            progress.show = lambda _: bars.update(bar, completed=progress.rows.total(), figures=figures())
            yield
        return

    told = 0

    def line(_) -> None:
        nonlocal told
        done = progress.rows.total()
        if done >= told + max(1, total // LINES) or (done == total and done > told):
            told = done
            console.print(f"{done:,}/{total:,} rows: {figures()}", highlight=False, soft_wrap=True)

    progress.show = line
    yield
