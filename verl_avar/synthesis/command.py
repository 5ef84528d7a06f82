"""`avar synth`: visual-anchored training data from images, questions and answers, by models at endpoints.

avar synth run config.yaml [key=value …] [--retry REASON …]     makes what is missing
avar synth prompts FOLDER                                       copies the prompts, to be edited
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from verl_avar.errors import ConfigError

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_BUDGET = 1, 2, 3
EXIT_STOPPED = 128 + signal.SIGTERM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """avar synth"""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="synth")
    run = commands.add_parser("run", help="describe, reason, anchor, check: makes what is missing")
    run.add_argument("config", help="yaml of settings; see verl_avar/synthesis/README.md")
    run.add_argument("overrides", nargs="*", metavar="key=value", help="settings that count instead of the yaml's")
    run.add_argument(
        "--retry", action="append", default=[], metavar="REASON",
        help="ask again the stage that rejected rows for this reason, such as wrong_answer or anchor:leak",
    )  # fmt: skip
    run.add_argument("--ray", metavar="ADDRESS", help="spread the rows over a Ray cluster: its address, or local")
    run.add_argument("--workers", type=int, default=4, help="processes on the Ray cluster (4)")
    prompts = commands.add_parser("prompts", help="copy the prompts that ship with the package, to be edited")
    prompts.add_argument("folder", type=Path)


def run(arguments: argparse.Namespace) -> int:
    """Exit status 0: every row is accepted or rejected; 1: an endpoint can't be used; 2: a mistake in the settings or
    the data; 3: the budget is spent; 143: asked to end. After 1, 3 and 143 the same command goes on."""
    from verl_avar.synthesis.endpoint import EndpointError

    try:
        if arguments.synth == "prompts":
            from verl_avar.synthesis.prompt import copy_prompts

            for path in copy_prompts(arguments.folder):
                print(path)
            return 0
        return _run(arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except (EndpointError, OSError) as error:
        print(f"error: {error}. The same command goes on from here", file=sys.stderr)
        return EXIT_FAILED


def _run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from verl_avar.synthesis import config as settings
    from verl_avar.synthesis.endpoint import EndpointError
    from verl_avar.synthesis.pipeline import Progress
    from verl_avar.synthesis.run import SIGNALLED, check_prompts, conclude, make_calls, prepare
    from verl_avar.synthesis.settle import send_again
    from verl_avar.synthesis.store import locked
    from verl_avar.synthesis.summary import print_summary

    config = settings.load(arguments.config, arguments.overrides)
    check_prompts(config)
    out, console = Path(config.out).expanduser(), Console()
    with locked(out):
        counts = prepare(config, out)
        console.print(intake_line(counts), highlight=False, soft_wrap=True)
        if arguments.retry:
            for reason, count in send_again(config, out, arguments.retry).items():
                console.print(f"{reason}: {count} rows are asked again", highlight=False)
        progress, error = Progress(), None
        with _shown(progress, counts["rows"], console):
            try:
                make_calls(config, out, progress, arguments.ray, arguments.workers)
            except EndpointError as failure:
                error = failure
        summary = conclude(config, out)
    print_summary(summary, console)
    if error:
        raise error
    if progress.stop:
        print(f"stopped: {progress.stop}; {summary['pending']} rows are left", file=sys.stderr)
        return EXIT_STOPPED if progress.stop == SIGNALLED else EXIT_BUDGET
    return 0


def _shown(progress, total: int, console):
    """A bar on a terminal, twenty lines elsewhere."""
    from contextlib import contextmanager

    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    def figures() -> str:
        rows, rate = progress.rows, progress.calls / max(1e-9, time.monotonic() - started)
        cost = f", cost {progress.spent.cost:,.2f}" if progress.spent.cost else ""
        return (
            f"accepted {rows['accepted']:,}, rejected {rows['rejected']:,}, {progress.calls:,} calls "
            f"({rate:.1f}/s), {progress.spent.tokens:,} tokens{cost}"
        )

    started, told = time.monotonic(), [0]

    @contextmanager
    def bars():
        if not console.is_terminal:

            def line(_) -> None:
                done = progress.rows.total()
                if done >= told[0] + max(1, total // 20) or done == total:
                    told[0] = done
                    console.print(f"{done:,}/{total:,} rows: {figures()}", highlight=False, soft_wrap=True)

            progress.show = line
            yield
            return
        columns = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Bars(*columns, TextColumn("{task.fields[figures]}"), console=console) as bar:
            task = bar.add_task("rows", total=total, figures="")
            progress.show = lambda _: bar.update(task, completed=progress.rows.total(), figures=figures())
            yield

    return bars()
