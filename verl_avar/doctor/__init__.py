"""`avar doctor`: is this environment fit to run AVAR, and is the plugin active where it has to be?

Each check returns findings; what failed comes with a line that says how to fix it. What needs verl, Ray or vLLM runs in
a process of its own (probes.py), so that an engine that hangs, crashes or logs pages can't hide the finding.
"""

from typing import TYPE_CHECKING

from verl_avar.doctor.environment import Finding, absent, disk, entry_points, memory, shared_memory, stack, versions
from verl_avar.doctor.processes import engine_probes, library_probes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

__all__ = ["Finding", "diagnose", "run"]


def diagnose(engines: bool = True) -> "Iterator[Finding]":
    """Yields the findings one by one, quick ones first; `engines=False` leaves Ray and vLLM out."""
    name, finding = stack()
    yield finding
    if name is None:
        return
    yield from versions(name)
    yield from absent(name)
    yield from entry_points()
    yield from (disk(), memory(), shared_memory())
    yield from library_probes(name)
    if engines:
        yield from engine_probes(name)


def run(engines: bool = True, console: "Console | None" = None) -> int:
    """Prints a table of the findings and the fixes; returns 0 when all is well, 1 otherwise."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    findings = []
    with console.status("starting") as status:
        for finding in diagnose(engines):
            findings.append(finding)
            status.update(f"{finding.name} checked")
    table = Table(title="avar doctor", show_edge=False)
    table.add_column("check")
    table.add_column("")
    table.add_column("found", overflow="fold")
    for finding in findings:
        mark = Text("✓", "green") if finding.ok else Text("✗", "bold red")
        table.add_row(Text(finding.name), mark, Text(finding.detail))
    console.print(table)
    failed = [finding for finding in findings if not finding.ok]
    for finding in failed:
        console.print(Text.assemble(("✗ ", "bold red"), f"{finding.name}: {finding.detail}\n  fix: {finding.fix}"))
        if finding.log:
            console.print(Text(f"  log: {finding.log}"), soft_wrap=True)
    if not failed:
        skipped = "" if engines else " (Ray and vLLM were not started)"
        console.print(f"All {len(findings)} checks passed{skipped}.", highlight=False)
    return 1 if failed else 0
