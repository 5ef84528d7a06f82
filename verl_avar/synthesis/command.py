"""`avar synth`: visual-anchored training data from images, questions and answers, by models at endpoints.

avar synth run config.yaml [key=value …] [--retry REASON …]     makes what is missing
avar synth prompts FOLDER                                       copies the prompts, to be edited
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from pathlib import Path

from verl_avar.errors import ConfigError

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_BUDGET = 1, 2, 3
EXIT_STOPPED, EXIT_INTERRUPTED = 128 + signal.SIGTERM, 128 + signal.SIGINT


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
    """Exit status 0: every row is accepted or rejected; 1: an endpoint or the cluster can't be used; 2: a mistake in
    the settings or the data; 3: the budget is spent; 143: asked to end, by a signal while calls are made; 130: by
    Ctrl-C at another time. After 1, 130 and 143 the same command goes on, after 3 with a larger budget.
    """
    from verl_avar.calls.endpoint import EndpointError
    from verl_avar.synthesis.ray_data import ClusterError

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
    except KeyboardInterrupt:
        print("stopped. The same command goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (EndpointError, ClusterError, OSError) as error:
        print(f"error: {error}. The same command goes on from here", file=sys.stderr)
        return EXIT_FAILED


def _run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from verl_avar.synthesis import config
    from verl_avar.synthesis.pipeline import SIGNALLED
    from verl_avar.synthesis.run import synthesise
    from verl_avar.synthesis.summary import print_summary

    settings, console = config.load(arguments.config, arguments.overrides), Console()
    result = synthesise(settings, console, arguments.retry, arguments.ray, arguments.workers)
    again = ["avar", "synth", "run", arguments.config, *arguments.overrides]
    if arguments.ray is not None:
        again += ["--ray", arguments.ray, "--workers", str(arguments.workers)]
    print_summary(result.summary, console, Path(settings.out).expanduser(), shlex.join(again))
    if result.error:
        raise result.error
    if result.stop:
        how = "" if result.stop == SIGNALLED else "; a larger budget.tokens or budget.cost goes on from here"
        print(f"stopped: {result.stop}; {result.summary['pending']:,} rows are left{how}", file=sys.stderr)
        return EXIT_STOPPED if result.stop == SIGNALLED else EXIT_BUDGET
    return 0
