"""`avar serve MODEL`: vLLM's OpenAI server with visual-attention scores and a bias per request.

`vllm serve` with `--kv-transfer-config` set, in this process; see SERVING.md for requests and responses.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.util import find_spec
from typing import Any, NoReturn

from verl_avar.rollout import kv_transfer_config
from verl_avar.rollout.options import SCORE_FORMS

EPILOG = """Every other flag is vLLM's; --help=all lists them, --help=SECTION those of a section. Without this command:
vllm serve MODEL --kv-transfer-config "$(avar serve --print-config)\""""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds our flags; what this parser does not know is vLLM's (`parse_known_args`)."""
    parser.usage = "avar serve MODEL [options of avar] [options of vllm serve]"
    parser.epilog = EPILOG
    parser.add_argument("-h", "--help", nargs="?", const="", metavar="SECTION", help="this text; with SECTION vLLM's")
    parser.add_argument("--print-config", action="store_true", help="print the JSON of --kv-transfer-config and end")
    bias = {"type": float, "default": 0.0, "metavar": "B"}
    parser.add_argument("--visual-bias", **bias, help="default of requests: added to the attention logits of the image")
    parser.add_argument("--system-bias", **bias, help="the same for the system prompt")
    parser.add_argument(
        "--attention-scores", choices=SCORE_FORMS, default="summary", help="default of requests: form of their scores"
    )
    parser.add_argument(
        "--attention-layers", type=layer_numbers, metavar="N,N,…", help="the layers that are scored, from 0 (all)"
    )


def layer_numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"numbers with commas between, like 0,2,5, not {text!r}") from None


def run(arguments: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> int:
    """Serves until vLLM ends. rest: MODEL and vLLM's arguments. Exits with 2 and one line for arguments that can't be
    served, else as vLLM's own command does."""
    if arguments.help == "":
        parser.print_help()
        return 0
    if arguments.help:
        rest = [*rest, f"--help={arguments.help}"]
    try:
        config = kv_transfer_config(
            arguments.visual_bias, arguments.system_bias, arguments.attention_scores, arguments.attention_layers
        )
    except ValueError as error:
        refuse(str(error))
    if arguments.print_config:
        print(json.dumps(config))
        return 0
    if not rest:
        refuse("MODEL is missing: avar serve MODEL [options]")
    if find_spec("vllm") is None:
        refuse("vLLM is not installed here: recipes/bootstrap.sh installs it with everything else")
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") != "0":
        refuse("VLLM_USE_RUST_FRONTEND: vLLM's Rust server checks no options and returns no scores; unset it")
    serve(config, rest)
    return 0


def refuse(why: str) -> NoReturn:
    print(f"avar serve: {why}", file=sys.stderr)
    raise SystemExit(2)


def serve(config: dict[str, Any], rest: list[str]) -> None:
    """Runs vLLM's own command line, whose `serve` gets `config` between reading its arguments and starting."""
    from vllm.config import KVTransferConfig
    from vllm.entrypoints.cli import main, serve

    from verl_avar.compat import verl_vllm_cpu

    class Serve(serve.ServeSubcommand):
        def validate(self, args: argparse.Namespace) -> None:
            if args.model_tag is None:
                refuse("MODEL is missing: avar serve MODEL [options]")
            if args.kv_transfer_config is not None:
                refuse("--kv-transfer-config is what this command sets: leave it out, or use vllm serve")
            args.kv_transfer_config = KVTransferConfig(**config)
            super().validate(args)

    serve.cmd_init = lambda: [Serve()]
    sys.argv = ["vllm", "serve", *rest]
    # vLLM's command asks for the version of a distribution named "vllm", which the CPU build is not.
    with verl_vllm_cpu.patch(main):
        main.main()
