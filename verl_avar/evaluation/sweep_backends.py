"""Which backend `avar intervene` runs its sweep on: transformers, vLLM in this process, or a vLLM server."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from verl_avar.evaluation.options import load, model_path, placement, positive

if TYPE_CHECKING:
    from verl_avar.evaluation.rows import Row
    from verl_avar.evaluation.sweep import Backend

BACKENDS = ("transformers", "vllm")
CONCURRENCY, TIMEOUT_S = 64, 600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that choose a backend."""
    group = parser.add_argument_group(
        "vLLM", "The same answers, many at a time: from an engine started here, or a server started by `avar serve`."
    )
    group.add_argument("--backend", choices=BACKENDS, help="what answers (default: transformers)")
    group.add_argument("--server", metavar="URL", help="a running server, http://HOST:PORT; implies --backend vllm")
    group.add_argument(
        "--served-model", metavar="NAME", help="the server's name of the checkpoint (default: asked for)"
    )
    group.add_argument(
        "--timeout", type=positive, metavar="SECONDS", help=f"for one answer of a server (default: {TIMEOUT_S})"
    )
    group.add_argument(
        "--concurrency", type=positive, metavar="N", help=f"requests in flight at a time (default: {CONCURRENCY})"
    )
    group.add_argument(
        "--engine-option",
        action="append",
        metavar="NAME=VALUE",
        help="argument of the engine started here, max_model_len=8192 or tensor_parallel_size=2; may be given again",
    )


def backend_settings(arguments: argparse.Namespace) -> dict:
    """{"backend", "dtype"}, the part of a sweep's settings that the backend decides.

    Raises ValueError for options that don't go together, and for a bias that vLLM has no request for.
    """
    backend = arguments.backend or ("vllm" if arguments.server else "transformers")
    given = {
        option
        for option in ("server", "served_model", "timeout", "concurrency", "engine_option", "device")
        if getattr(arguments, option) is not None
    }
    given |= {"batch_size"} if arguments.batch_size > 1 else set()
    given |= {"dtype"} if arguments.dtype != "auto" else set()
    if backend == "transformers":
        idle, why = given - {"device", "batch_size", "dtype"}, "--backend vllm"
    elif arguments.server:
        idle, why = (
            given & {"engine_option", "device", "batch_size", "dtype"},
            "--backend vllm without --server",
        )
    else:
        idle, why = given & {"served_model", "timeout", "device", "batch_size"}, "--server or --backend transformers"
    if idle:
        names = ", ".join(f"--{option.replace('_', '-')}" for option in sorted(idle))
        raise ValueError(f"{names}: an option of {why}")
    if backend == "transformers":
        return {"backend": backend, "dtype": placement(arguments)[1]}
    _check_bias({"layers": arguments.layers, "queries": arguments.queries, "mode": arguments.mode})
    if arguments.server:
        return {"backend": "vllm server", "dtype": "the server's"}
    return {"backend": backend, "dtype": placement(arguments)[1]}


def _check_bias(bias: dict) -> None:
    for name, wanted in (("mode", "bias"), ("queries", "all"), ("layers", None)):
        if bias[name] != wanted:
            value = ",".join(map(str, bias[name])) if name == "layers" else bias[name]
            raise ValueError(
                f"--{name} {value}: vLLM adds a bias to the logits of every layer and every query; use --backend "
                "transformers"
            )


@contextmanager
def opened(arguments: argparse.Namespace, bias: dict, visual: bool, rows: Sequence[Row]) -> Iterator[Backend]:
    """The backend that the options name, with the checkpoint loaded and checked; what it started ends with the context.

    bias: `layers`, `queries` and `mode` of `role_bias`. visual: whether a point biases visual keys. rows: what it will
    answer. Raises OSError, ValueError or RuntimeError, in one line.
    """
    if not (arguments.server or arguments.backend == "vllm"):
        from verl_avar.evaluation import sweep_transformers

        checkpoint = load(arguments)
        sweep_transformers.check(checkpoint, visual, bias)
        yield sweep_transformers.backend(checkpoint, bias, arguments.max_new_tokens, arguments.batch_size)
        return
    from verl_avar.evaluation.sweep_prompts import Prompts, check_model, load_prompter
    from verl_avar.evaluation.sweep_vllm import VllmBackend

    model = model_path(arguments)
    checkpoint = load_prompter(model)
    check_model(checkpoint)
    if arguments.server:
        from verl_avar.evaluation.sweep_server import connect

        engine = connect(arguments.server, checkpoint, model, arguments.served_model, arguments.timeout or TIMEOUT_S)
    else:
        from verl_avar.evaluation.scoring import read_options
        from verl_avar.evaluation.sweep_engine import start

        options = read_options(arguments.engine_option or ())
        engine = start(model, placement(arguments)[1], max(len(row.images) for row in rows), options)
    backend = VllmBackend(Prompts(checkpoint, arguments.max_new_tokens), engine, arguments.concurrency or CONCURRENCY)
    try:
        yield backend
    finally:
        backend.close()
