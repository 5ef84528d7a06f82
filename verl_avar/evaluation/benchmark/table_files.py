"""The table as Markdown, LaTeX and CSV. A difference is bold only where it is beyond chance."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from verl_avar.evaluation.benchmark.table import Cell, Table, published_value

LATEX = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
         "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "–": "--"}  # fmt: skip
FIELDS = ("kind", "model", "benchmark", "title", "part", "value", "low", "high", "asked", "questions", "truncated",
          "format", "failed", "base", "pairs", "delta", "delta_low", "delta_high", "gained", "lost", "p", "p_holm",
          "clear", "published_model", "published", "delta_published")  # fmt: skip


def write_table(table: Table, folder: Path) -> list[Path]:
    """Writes table.md, table.tex and table.csv; returns their paths."""
    from verl_avar.evaluation.partial import write_text

    texts = {"table.md": markdown(table), "table.tex": latex(table), "table.csv": as_csv(table)}
    for name, text in texts.items():
        write_text(Path(folder) / name, text)
    return [Path(folder) / name for name in texts]


def points(share: float, sign: bool = False) -> str:
    """A share in %, with one decimal; a difference with its sign."""
    text = f"{100 * share:+.1f}" if sign else f"{100 * share:.1f}"
    return "0.0" if text in ("-0.0", "+0.0") else text.replace("-", "−")


def between(interval: Sequence[float] | None, sign: bool = False) -> str:
    return "" if interval is None else f"({points(interval[0], sign)} to {points(interval[1], sign)})"


def notes(table: Table) -> list[str]:
    """What must be read with the table."""
    lines = ["Figures in %, with 95 % intervals."]
    if table.tests:
        lines.append(
            f"Signed: points over the re-run {table.base} on the same questions, with the paired bootstrap's interval; "
            f"p of the exact McNemar test, corrected (Holm) for the table's tests ({table.tests}). Bold: beyond chance "
            "by both; the average by its interval alone."
        )
    if table.published:
        lines.append("†: published, other protocol; differences to it mix the model's and the protocol's.")
    alike: dict[str, list[str]] = {}  # what is said of several models is said once
    for line in table.lines:
        none = f"no average, for these were not run, or not to their end: {', '.join(line.missing)}."
        for text in [*([none] if line.missing else []), *line.sizes]:
            alike.setdefault(text, []).append(line.name)
    lines += [f"{', '.join(names)}: {text}" for text, names in alike.items()]
    return lines


def markdown(table: Table) -> str:
    """A model a row; in a cell the figure, its interval, and below it the differences."""

    def escaped(name: str) -> str:
        return "".join("\\" + sign if sign in "\\`*_{}[]<>#|" else sign for sign in " ".join(name.split()))

    def cell(one: Cell | None) -> str:
        if one is None:
            return "–"
        parts = [f"{points(one.value)} {between(one.interval)}".strip()]
        if one.delta and one.delta["pairs"]:
            change = points(one.delta["value"], True)
            change = f"**{change}**" if one.delta["clear"] else change
            p = f", p {p_text(one.delta['p_holm'])}" if "p_holm" in one.delta else ""
            parts.append(f"{change} {between(one.delta['interval'], True)}{p}".strip())
        if one.published:
            parts.append(f"{points(one.published['delta'], True)} to published†")
        return " <br>".join(parts)  # a terminal leaves the break out, not the space

    rows = [["model", *table.titles.values()], [":--", *["--:"] * len(table.titles)]]
    for line in table.lines:
        rows.append([escaped(line.name), *(cell(line.cells[name]) for name in table.titles)])
    for row in table.published:
        values = [published_value(row, name) for name in table.titles]
        rows.append([f"{escaped(row.model)}†", *("–" if v is None else points(v) for v in values)])
    body = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return body + "\n\n" + "\n".join(f"- {escaped(line)}" for line in notes(table)) + "\n"


def latex(table: Table) -> str:
    """A `tabular` for the package booktabs: a model's figures in one row, its differences in the next."""

    def escaped(text: str) -> str:
        return "".join(LATEX.get(sign, sign) for sign in " ".join(text.split()))

    def signed(share: float, interval=None, bold: bool = False) -> str:
        number = points(share, True).replace("−", "-")
        ends = "" if interval is None else rf"\,[{', '.join(points(end, True).replace('−', '-') for end in interval)}]"
        return rf"$\mathbf{{{number}}}{ends}$" if bold else f"${number}{ends}$"

    def row(name: str, cells: Sequence[str]) -> str:
        return " & ".join([name, *cells]) + r" \\"

    lines = [rf"\begin{{tabular}}{{l{'r' * len(table.titles)}}}", r"\toprule"]
    lines += [row("Model", [escaped(title) for title in table.titles.values()]), r"\midrule"]
    for line in table.lines:
        cells = [line.cells[name] for name in table.titles]
        lines.append(row(escaped(line.name), ["--" if c is None else points(c.value) for c in cells]))
        deltas = [c.delta if c is not None and c.delta and c.delta["pairs"] else None for c in cells]
        if any(deltas):
            shown = [rf"\scriptsize {signed(d['value'], d['interval'], d['clear'])}" if d else "" for d in deltas]
            lines.append(row(rf"\quad\scriptsize to {escaped(table.base)}", shown))
        other = [c.published if c is not None else None for c in cells]
        if any(other):
            shown = [rf"\scriptsize {signed(one['delta'])}" if one else "" for one in other]
            lines.append(row(r"\quad\scriptsize to published, other protocol$^\dagger$", shown))
    if table.published:
        lines.append(r"\midrule")
        for one in table.published:
            values = [published_value(one, name) for name in table.titles]
            cells = ["--" if v is None else points(v) for v in values]
            lines.append(row(rf"{escaped(one.model)} (published, other protocol$^\dagger$)", cells))
    lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join([*(f"% {line}" for line in notes(table)), *lines]) + "\n"


def as_csv(table: Table) -> str:
    """A line per model and benchmark with all there is; figures as shares.

    kind: run; part, of a run's figure (its components, and subsets of its questions); published, other protocol.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
    writer.writeheader()
    for line in table.lines:
        for name, title in table.titles.items():
            about = {"kind": "run", "model": line.name, "benchmark": name, "title": title}
            cell = line.cells[name]
            writer.writerow(about | (_cell_fields(cell, table.base) if cell is not None else {}))
            for part, figure in _parts(cell.figures if cell is not None else {}):
                writer.writerow(
                    about | {"kind": "part", "part": part} | _value_fields(figure["value"], figure["interval"])
                )
    for row in table.published:
        for name, title in table.titles.items():
            about = {"kind": "published", "model": row.model, "benchmark": name, "title": title}
            writer.writerow(about | {"value": published_value(row, name)})
    return out.getvalue()


def _value_fields(value: float, interval: Sequence[float] | None, prefix: str = "") -> dict:
    low, high = interval or (None, None)
    return {prefix or "value": value, f"{prefix}{'_' * bool(prefix)}low": low,
            f"{prefix}{'_' * bool(prefix)}high": high}  # fmt: skip


def _cell_fields(cell: Cell, base: str) -> dict:
    found = _value_fields(cell.value, cell.interval) | {"asked": cell.asked, "questions": cell.questions}
    found |= {name: cell.figures.get("rates", {}).get(name) for name in ("truncated", "format", "failed")}
    if cell.delta and cell.delta["pairs"]:
        found |= {name: cell.delta.get(name) for name in ("pairs", "gained", "lost", "p", "p_holm", "clear")}
        found |= {"base": base} | _value_fields(cell.delta["value"], cell.delta["interval"], "delta")
    if cell.published:
        found |= {"published_model": cell.published["model"], "published": cell.published["value"]}
        found |= {"delta_published": cell.published["delta"]}
    return found


def components(figures: Mapping) -> list[tuple[str, Mapping]]:
    """What a benchmark's main figure is made of, by name: accuracy; aAcc, fAcc, qAcc; standard, vision."""
    return [(name, figure) for name, figure in figures.items()
            if name != "main" and isinstance(figure, Mapping) and "interval" in figure]  # fmt: skip


def _parts(figures: Mapping) -> Iterator[tuple[str, Mapping]]:
    """The components of a benchmark's figure by name, and its subsets as KEY=VALUE."""
    yield from components(figures)
    for key, values in figures.get("subsets", {}).items():
        for value, figure in values.items():
            yield f"{key}={value}", figure


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"
