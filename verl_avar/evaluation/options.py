"""Options that `avar vas` and `avar intervene` share, and what their values mean."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from verl_avar.evaluation.checkpoint import Checkpoint


def add_shared(parser: argparse.ArgumentParser, data: str) -> None:
    """Which checkpoint, how it runs, and which rows. data: what the rows may be."""
    parser.add_argument("--model", required=True, help="checkpoint: a folder, or a name in the local hub cache")
    parser.add_argument("--data", required=True, help=data)
    parser.add_argument("--question", help="the question to ask of images that have none of their own")
    parser.add_argument("--system", help="a system message for rows that have none (without one there is no VAS)")
    parser.add_argument("--max-samples", type=positive, metavar="N", help="use the first N rows only")
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        default=512,
        help="of a response that the model writes (default: 512)",
    )
    parser.add_argument("--batch-size", type=positive, metavar="N", default=1, help="rows at a time (default: 1)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="auto: float32 on a CPU, the checkpoint's own on a GPU",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    parser.add_argument("--strict", action="store_true", help="stop at the first row that can't be used")


def placement(arguments: argparse.Namespace) -> tuple[str, str]:
    """The device, and the name of the number format; "auto" is left for a checkpoint's own on a GPU.

    Raises ValueError for a GPU where there is none, RuntimeError for a device that torch does not know.
    """
    import torch

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = torch.device(device).type
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch finds no GPU here")
    return device, "float32" if arguments.dtype == "auto" and kind == "cpu" else arguments.dtype


def load(arguments: argparse.Namespace) -> Checkpoint:
    """The checkpoint that the options name, where they want it. Raises as `load_checkpoint` and `placement` do."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from verl_avar.evaluation.checkpoint import load_checkpoint

    disable_progress_bar()
    device, dtype = placement(arguments)
    return load_checkpoint(
        model_path(arguments), dtype=dtype if dtype == "auto" else getattr(torch, dtype), device=device
    )


def model_path(arguments: argparse.Namespace) -> str:
    """The checkpoint's name: a path written one way (no final slash, a name at its end), or a name on the hub."""
    path = Path(arguments.model)
    if not path.exists():
        return arguments.model
    return str(path if path.name not in ("", "..") else path.resolve())


def layer_list(text: str) -> list[int]:
    """Layers written as 0,4,8-11."""
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        found = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        if not found:
            raise argparse.ArgumentTypeError(f"'{text}' is no list of layers such as 0,4,8-11")
        layers |= set(found)
    return sorted(layers)


def positive(text: str) -> int:
    """A count of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no positive number")
    return int(text)


def count(text: str) -> int:
    """A count, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is no count")
    return int(text)


def share(text: str) -> float:
    """A number above 0 and below 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no share between 0 and 1")
    return value
