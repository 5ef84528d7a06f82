"""Results of `avar vas` as a table: a column per checkpoint, and the change from the first beside each other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from verl_avar.report.results import digits, number, percent
from verl_avar.report.vas_results import (
    SCOPES,
    between,
    check_vas,
    interval_text,
    main_scope,
    model_names,
    scopes_of,
    series,
)
from verl_avar.report.vas_verdicts import vas_verdicts, worth_naming

if TYPE_CHECKING:
    from rich.console import Console

FIRST, OTHER = 42, 30  # terminal columns that the first result (with the row names) and each further one take


@dataclass(frozen=True)
class Line:
    """One row of the table: what it says of a result, and how a change from the first result is told."""

    name: str
    text: Callable[[dict], str]
    value: Callable[[dict], float | None] | None = None
    points: bool = False  # the change as a difference in points of %, not as a ratio

    def change(self, first: dict, other: dict) -> str:
        if self.value is None:
            return ""
        old, new = self.value(first), self.value(other)
        if old is None or new is None:
            return "–"
        if self.points:
            return f"{100 * (new - old):+.1f} pts"
        return f"{digits(new / old)}×" if old else "–"


def sections(results: Sequence[dict]) -> list[tuple[str, list[Line]]]:
    """The table's rows under their headings: the run, each scope, and the responses' course where it was measured."""
    found = [("", [Line("rows (failed)", _rows), Line("layers × heads", _shape)])]
    for scope in scopes_of(results):
        found.append((SCOPES[scope], _scope_lines(scope, results)))
    if any(number(result, "decay", "first") is not None for result in results):
        found.append(
            (
                "along the response",
                [
                    _share("image, first quarter", "decay", "first"),
                    _share("image, last quarter", "decay", "last"),
                ],
            )
        )
    return found


def _scope_lines(scope: str, results: Sequence[dict]) -> list[Line]:
    at = ("scopes", scope)
    # Rows that would say nothing are left out: no result has sinks, or none has a border to tell from the rest.
    sinks = any(number(result, *at, "sinks", "tokens") for result in results)
    borders = any(number(result, *at, "sinks", "border_share") is not None for result in results)

    def vas(name: str, *keys: str) -> Line:
        return Line(name, lambda r: digits(number(r, *at, *keys)), lambda r: number(r, *at, *keys))

    def ends(key: str) -> Line:
        return Line("  95 % interval", lambda r: interval_text(between(r["scopes"].get(scope) or {}, key)))

    lines = [
        Line("VAS (paper's)", lambda r: _classed(r, scope), lambda r: number(r, *at, "vas")),
        ends("interval"),
        vas("  without sinks", "sinks", "vas"),
        vas("  without border", "sinks", "no_border_vas"),
        vas("heads averaged", "head_mean"),
        ends("head_mean_interval"),
        vas("  without sinks", "sinks", "head_mean"),
        vas("  without border", "sinks", "no_border_head_mean"),
        vas("  median", "median"),
        _share("attention to image", *at, "mass", "visual"),
        _share("attention to system", *at, "mass", "system"),
        Line("strongest layers", lambda r: _strongest(r, scope)),
        Line("samples (no VAS)", lambda r: _samples(r, scope)),
    ]
    hidden = {"  without sinks": not sinks, "  without border": not borders}
    return [line for line in lines if not hidden.get(line.name)]


def _share(name: str, *keys: str) -> Line:
    def text(result: dict) -> str:
        value = number(result, *keys)
        return "–" if value is None else f"{percent(value)} %"

    return Line(name, text, lambda r: number(r, *keys), points=True)


def _rows(result: dict) -> str:
    failed = len(result.get("failed") or [])
    return f"{result['samples']} ({failed})"


def extent(result: dict) -> str:
    """How much was measured."""
    planned = result.get("planned") or result["samples"]
    return f"{result['samples']} of {planned} rows, {len(result['layers'])} layers of {result['heads']} heads"


def _shape(result: dict) -> str:
    return f"{len(result['layers'])} × {result['heads']}"


def _classed(result: dict, scope: str) -> str:
    class_ = (result["scopes"].get(scope) or {}).get("class")
    value = digits(number(result, "scopes", scope, "vas"))
    return f"{value} {class_}" if class_ else value


def _strongest(result: dict, scope: str) -> str:
    """Layers with most attention to the image."""
    by_layer = series(result, "scopes", scope, "by_layer", "visual")
    if by_layer is None or len(by_layer) < 2:
        return "–"
    order = [i for i in (-by_layer).argsort(kind="stable") if by_layer[i] == by_layer[i]]
    return ", ".join(str(result["layers"][i]) for i in order[: min(3, len(by_layer) - 1)])


def _samples(result: dict, scope: str) -> str:
    record = result["scopes"].get(scope)
    return "–" if record is None else f"{record.get('samples', '–')} ({record.get('skipped', 0)})"


def table_rows(results: Sequence[dict], names: Sequence[str]) -> tuple[list[str], list[tuple[str, list[list[str]]]]]:
    """Heads, and the rows of each section, for the terminal and the page alike: a column per result and its change from
    the first, or a column per scope of a single result."""
    if len(results) == 1:
        return _single(results[0], names[0])
    heads = ["", names[0]]
    for name in names[1:]:
        heads += [name, "change"]
    body = []
    for heading, lines in sections(results):
        rows = []
        for line in lines:
            row = [line.name, line.text(results[0])]
            for other in results[1:]:
                row += [line.text(other), line.change(results[0], other)]
            rows.append(row)
        body.append((heading, rows))
    return heads, body


def _single(result: dict, name: str) -> tuple[list[str], list[tuple[str, list[list[str]]]]]:
    scopes = scopes_of([result])
    if len(scopes) < 2:
        body = [(heading, [[line.name, line.text(result)] for line in lines]) for heading, lines in sections([result])]
        return ["", name], body
    _, *of_scopes = sections([result])
    columns = [lines for _, lines in of_scopes[: len(scopes)]]
    body = [("", [[row[0].name, *(line.text(result) for line in row)] for row in zip(*columns, strict=True)])]
    for heading, lines in of_scopes[len(scopes) :]:
        body.append((heading, [[line.name, "", line.text(result)] for line in lines]))
    return ["", *(SCOPES[scope] for scope in scopes)], body


def print_vas(results: Sequence[dict], names: Sequence[str] | None = None, console: "Console | None" = None) -> None:
    """Prints results side by side, the first as the base of comparison, and what they say.

    Results that do not fit side by side get one line each instead. Raises ValueError as `check_vas` does, or where
    there are no results or not a name for each.
    """
    from rich.console import Console

    names = checked(results, names)
    console = console or Console()
    fits = 1 + max(1, (console.width - FIRST) // OTHER)
    (_print_columns if len(results) <= fits else _print_overview)(results, names, console)
    for line in [*vas_verdicts(results, names), *worth_naming(results, names)]:
        console.print(f"• {line}", highlight=False, markup=False)


def checked(results: Sequence[dict], names: Sequence[str] | None) -> list[str]:
    """The names of results that are as the schema says."""
    if not results:
        raise ValueError("no results of avar vas to show")
    for result in results:
        check_vas(result)
    if names is not None and len(names) != len(results):
        raise ValueError(f"{len(names)} names for {len(results)} results of avar vas")
    return list(names) if names is not None else model_names(results)


def _print_columns(results: Sequence[dict], names: Sequence[str], console: "Console") -> None:
    from rich.markup import escape
    from rich.table import Table

    heads, body = table_rows(results, names)
    table = Table(
        title="Visual attention" + (f" of {escape(names[0])}\n{extent(results[0])}" if len(results) == 1 else "")
    )
    for index, head in enumerate(heads):
        table.add_column(escape(head), justify="left" if index == 0 else "right", overflow="fold")
    for heading, rows in body:
        if heading:
            table.add_row(f"[bold]{heading}[/bold]")
        for index, row in enumerate(rows, start=1):
            table.add_row(*row, end_section=index == len(rows))
    console.print(table)


def _print_overview(results: Sequence[dict], names: Sequence[str], console: "Console") -> None:
    from rich.markup import escape
    from rich.table import Table

    scope = main_scope(results) or "response"
    table = Table(title="Visual attention", caption=f"image: part of the attention of the {SCOPES[scope]}'s tokens")
    table.add_column("", overflow="fold")
    for name in ("VAS user", "heads avg.", "VAS resp.", "heads avg.", "image %"):
        table.add_column(name, justify="right", overflow="fold")
    for name, result in zip(names, results, strict=True):
        user, response = (
            [_classed(result, of), digits(number(result, "scopes", of, "head_mean"))] for of in ("user", "response")
        )
        table.add_row(escape(name), *user, *response, percent(number(result, "scopes", scope, "mass", "visual")))
    console.print(table)
