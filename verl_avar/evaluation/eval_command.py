"""`avar eval`: the paper's seven benchmarks, or your own, under one stated protocol, with the base beside the model.

avar eval --model M --base B --suite avar7 --data COPIES     answers, scores, table, page
avar eval compare A B …                                      the questions whose answers flipped, with images
avar eval published                                          the paper's tables, recomputed
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from verl_avar.errors import ConfigError
from verl_avar.evaluation.options import positive

HARNESSES = ("vlmevalkit", "lmms-eval")
CONTROLS = "no_image,grey_image,other_image,blackout"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `avar eval`."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="eval_command")
    compare = commands.add_parser("compare", help="the questions whose answers flipped between models, with images")
    compare.add_argument("folders", nargs="+", type=Path, help="model folders of an evaluation; the first is the base")
    compare.add_argument("--out", type=Path, default=Path("runs/eval_compare"), help="(runs/eval_compare)")
    looks = compare.add_mutually_exclusive_group()
    looks.add_argument("--attention", action="store_true", help="compute where the answers shown look in their images")
    looks.add_argument("--overlays", type=Path, help="or show such pictures from this folder: MODEL/BENCHMARK/ID.png")
    compare.add_argument(
        "--checkpoint",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="of a run, for --attention (the one it was run with)",
    )
    published = commands.add_parser("published", help="the paper's tables: averages and differences recomputed")
    published.add_argument("--out", type=Path, help="folder for the comparison figure")

    group = parser.add_argument_group("what is asked")
    group.add_argument("--model", help="checkpoint folder or hub name (suite miniature: the shipped base)")
    group.add_argument("--base", help="the model it was trained from, run beside it under the same protocol")
    group.add_argument("--suite", default="avar7", help="avar7, miniature, one benchmark's name, or a yaml (avar7)")
    group.add_argument("--data", type=Path, help="folder of local copies, as VLMEvalKit or the hub has them")
    group.add_argument("--limit", type=positive, metavar="N", help="the first N questions of each part, to try")
    group.add_argument("--allow-broken", action="store_true", help="leave out rows that are no question, and say so")
    group.add_argument("--out", type=Path, help="(runs/eval/SUITE)")
    group.add_argument("--name", help="the model's name in tables (its folder's)")
    group.add_argument("--base-name", help="the base's")
    group = parser.add_argument_group("how")
    group.add_argument("--protocol", help="think, direct or harness, for all benchmarks (each one's own: think)")
    group.add_argument("--max-tokens", type=positive, metavar="N", help="of a response (what the context leaves)")
    group.add_argument("--temperature", type=float, default=0.0, help="(0)")
    group.add_argument("--top-p", type=float, default=1.0, help="(1)")
    group.add_argument("--repeats", type=positive, default=1, help="sampled answers to each question (1)")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--attention", default="summary", choices=("off", "summary", "tokens"), help="(summary)")
    group = parser.add_argument_group("diagnostics: every question asked again")
    group.add_argument("--controls", nargs="?", const=CONTROLS, default="", metavar="LIST", help=f"({CONTROLS})")
    group.add_argument("--blackout", default="", metavar="LIST", help="shares of the image to make black: 0.25,0.5,1")
    group.add_argument("--beta", default="", metavar="LIST", help="biases of attention to the image, such as 0.1,0.2")
    group = parser.add_argument_group("scores, and what they are set beside")
    group.add_argument("--judge", metavar="URL", help="http://HOST:PORT/v1 of a model that judges (rules alone do)")
    group.add_argument("--judge-model", metavar="NAME", help="the judge's name there")
    group.add_argument("--judge-key-env", metavar="VAR", help="environment variable with the judge's key")
    group.add_argument("--harness", choices=HARNESSES, help="has it load, prompt and score (our own runner)")
    group.add_argument("--harness-path", type=Path, help="VLMEvalKit's checkout")
    group.add_argument("--harness-python", type=Path, help="bin/python of the harnesses' environment (.venv-eval's)")
    group.add_argument("--published", metavar="ROW", help="row of the paper's table to set the base beside")
    group = parser.add_argument_group("servers")
    group.add_argument("--server", help="http://HOST:PORT/v1 that serves the model already; else one is started")
    group.add_argument("--base-server", help="the same for the base")
    group.add_argument("--served-name", help="the server's name of the model (its path)")
    group.add_argument("--base-served-name", help="the same for the base")
    group.add_argument("--api-key-env", help="environment variable with the servers' key")
    group.add_argument("--concurrency", type=positive, default=16, help="requests at a time (16)")
    group.add_argument("--serve", default="", metavar="OPTIONS", help="options of `avar serve`, in quotes")


def run(arguments: argparse.Namespace) -> int:
    """Exit status 0; 1 where a server can't be used or an answer is missing; 2 for a mistake in arguments or data."""
    from rich.console import Console

    from verl_avar.calls.endpoint import EndpointError
    from verl_avar.evaluation.benchmark.harness.launch import HarnessFailed

    console = Console()
    try:
        if arguments.eval_command == "published":
            from verl_avar.evaluation.benchmark.published import run_published

            return run_published(arguments.out, console)
        if arguments.eval_command == "compare":
            return _compare(arguments, console)
        return _evaluate(arguments, console)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (EndpointError, HarnessFailed, OSError) as error:
        print(f"error: {error}. The same command goes on from here", file=sys.stderr)
        return 1


def conditions(arguments: argparse.Namespace) -> tuple[str, ...]:
    """plain, the controls that are asked for, and a condition for each share blacked out and each bias."""
    from verl_avar.evaluation.benchmark.conditions import check

    found = ["plain"]
    lists = {"": arguments.controls, "blackout=": arguments.blackout, "visual_bias=": arguments.beta}
    for before, given in lists.items():
        found += [before + word.strip() for word in given.split(",") if word.strip()]
    for condition in found:
        check(condition)
    return tuple(dict.fromkeys(found))


def _evaluate(arguments: argparse.Namespace, console) -> int:
    import shlex

    from verl_avar.evaluation.benchmark.definition import load_suite
    from verl_avar.evaluation.benchmark.run import Plan
    from verl_avar.evaluation.benchmark.run import run as run_model

    sampling = {"temperature": arguments.temperature, "top_p": arguments.top_p}
    if arguments.max_tokens:
        sampling["max_tokens"] = arguments.max_tokens
    if arguments.repeats > 1 and arguments.temperature == 0:
        raise ConfigError("--repeats of greedy answers are all the same: set --temperature")
    suite = Path(arguments.suite).stem
    folder = f"{suite}-{arguments.harness}" if arguments.harness else suite
    plan = Plan(
        suite=suite,
        benchmarks=load_suite(arguments.suite),
        out=arguments.out or Path("runs/eval") / folder,
        data=arguments.data,
        limit=arguments.limit,
        allow_broken=arguments.allow_broken,
        protocol=arguments.protocol,
        conditions=conditions(arguments),
        repeats=arguments.repeats,
        seed=arguments.seed,
        sampling=sampling,
        attention=arguments.attention,
        concurrency=arguments.concurrency,
        serve=shlex.split(arguments.serve),
        judge=judge(arguments),
    )
    if arguments.harness:
        from verl_avar.evaluation.benchmark.harness.suite import Harness
        from verl_avar.evaluation.benchmark.harness.suite import run as run_harness

        harness = Harness(arguments.harness, arguments.harness_path, arguments.harness_python)
        folders = [run_harness(plan, model, harness, console) for model in models(arguments)]
    else:
        folders = [run_model(plan, model, console) for model in models(arguments)]
    return report(folders, plan.out / "report", console, arguments.published)


def judge(arguments: argparse.Namespace):
    """The judge that is named, or None. Raises ConfigError for half a one."""
    from verl_avar.evaluation.benchmark.judge import Judge

    if not arguments.judge and not arguments.judge_model:
        return None
    if not (arguments.judge and arguments.judge_model):
        raise ConfigError("a judge is named by both --judge http://HOST:PORT/v1 and --judge-model NAME")
    return Judge(arguments.judge, arguments.judge_model, arguments.judge_key_env)


def models(arguments: argparse.Namespace) -> list:
    """The base, where one is named, and the model."""
    from verl_avar.evaluation.benchmark.run import Model

    path = arguments.model
    if path is None:
        if Path(arguments.suite).stem != "miniature":
            raise ConfigError("--model: name a checkpoint folder or a hub name")
        from verl_avar.miniature import base_path

        path = str(base_path())
    own = Model(path, arguments.name or Path(path).name, arguments.server, arguments.served_name, arguments.api_key_env)
    if arguments.base is None:
        return [own]
    name = arguments.base_name or Path(arguments.base).name
    if name == own.name:
        raise ConfigError(f"model and base are both named '{name}': tell them apart by --name and --base-name")
    base = Model(arguments.base, name, arguments.base_server, arguments.base_served_name, arguments.api_key_env)
    return [base, own]


def report(folders: list[Path], out: Path, console, published: str | None) -> int:
    """Writes tables and page, and prints the table; exit status 1 where answers are missing."""
    from rich.markdown import Markdown

    from verl_avar.evaluation.benchmark.runs import read_runs
    from verl_avar.report.eval_page import render_eval

    runs = read_runs(folders)
    page = render_eval(runs, out, published={runs[0].name: published} if published else None)
    console.print(Markdown((out / "table.md").read_text(encoding="utf-8")))
    console.print(f"{page}  the report, with controls, figures and the protocol", highlight=False, soft_wrap=True)
    return 1 if any((run.results["problem"] == "failed").any() for run in runs) else 0


def _compare(arguments: argparse.Namespace, console) -> int:
    from verl_avar.report.eval_compare import compare
    from verl_avar.report.eval_overlays import stored_overlays

    checkpoints = dict(given.partition("=")[::2] for given in arguments.checkpoint)
    if not all(name and path for name, path in checkpoints.items()):
        raise ConfigError("--checkpoint: NAME=PATH, the name of a run and the folder of its checkpoint")
    if checkpoints and not arguments.attention:
        raise ConfigError("--checkpoint is for --attention, which is not asked for")
    overlays = stored_overlays(arguments.overlays) if arguments.overlays else None
    page = compare(
        arguments.folders, arguments.out, overlays=overlays, attention=checkpoints if arguments.attention else None
    )
    console.print(f"{page}  the questions that flipped", highlight=False, soft_wrap=True)
    return 0
