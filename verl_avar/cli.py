"""`avar …`: the command line. Each command imports what it needs when it runs, so that `avar --help` is instant."""

import argparse
import sys
from collections.abc import Sequence

import verl_avar
from verl_avar.data import command as data_command
from verl_avar.evaluation import correlate, eval_command, intervene, vas_command
from verl_avar.rollout import serve
from verl_avar.synthesis import command as synth_command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. Bad arguments exit with 2, as argparse does."""
    parser = argparse.ArgumentParser(prog="avar", description=verl_avar.__doc__)
    parser.add_argument("--version", action="version", version=f"avar {verl_avar.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module, text in (
        ("vas", vas_command, "measure whether a vision-language checkpoint looks at its images while it reasons"),
        ("intervene", intervene, "sweep a bias of attention to the image at inference: does it help?"),
        ("correlate", correlate, "VAS against accuracy over several checkpoints"),
        ("eval", eval_command, "the seven benchmarks under one protocol, with the base beside the model"),
        ("data", data_command, "bring data sets of image questions to one schema, check and hash them"),
        ("synth", synth_command, "make visual-anchored reasoning from images, questions and answers"),
    ):
        command = commands.add_parser(name, help=text, description=module.__doc__.split("\n\n")[0])
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    add_serve(commands)
    add_doctor(commands)
    add_report(commands)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.run is serve.run:  # what we don't know is for vLLM
        return serve.run(arguments, rest, commands.choices["serve"])
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments.run(arguments)


def add_serve(commands: argparse._SubParsersAction) -> None:
    """avar serve"""
    text = "vLLM's OpenAI server with visual-attention scores and a bias per request"
    parser = commands.add_parser("serve", help=text, description=text, add_help=False, allow_abbrev=False)
    serve.add_arguments(parser)
    parser.set_defaults(run=serve.run)


def add_doctor(commands: argparse._SubParsersAction) -> None:
    """avar doctor"""
    text = "check the environment: versions, resources, and the plugin in the driver, in Ray and in vLLM"
    parser = commands.add_parser("doctor", help=text, description=text)
    parser.add_argument("--no-engines", action="store_true", help="don't start Ray and vLLM (seconds, not a minute)")

    def run(arguments: argparse.Namespace) -> int:
        from verl_avar import doctor

        return doctor.run(engines=not arguments.no_engines)

    parser.set_defaults(run=run)


def add_report(commands: argparse._SubParsersAction) -> None:
    """avar report"""
    text = "print the table and the findings of a finished run"
    parser = commands.add_parser("report", help=text, description=text)
    parser.add_argument("results", help="results.json of the run, or the run's folder")

    def run(arguments: argparse.Namespace) -> int:
        from verl_avar.report import print_table
        from verl_avar.report.results import read

        try:
            print_table(read(arguments.results))
        except (OSError, ValueError) as error:
            print(f"avar report: {error}", file=sys.stderr)
            return 1
        return 0

    parser.set_defaults(run=run)


if __name__ == "__main__":
    sys.exit(main())
