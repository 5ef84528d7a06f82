"""The command line that both trainers share: one line for whatever ends a run, and an exit status."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

from omegaconf import DictConfig

from verl_avar.errors import ConfigError
from verl_avar.training.compose import arguments, compose
from verl_avar.training.environment import prepare
from verl_avar.training.stopping import EXIT_STOPPED, Stopped

EXIT_FAILED, EXIT_BAD_INPUT = 1, 2


def main(name: str, run: Callable[[DictConfig], None], argv: list[str] | None) -> int:
    """Composes the config of trainer `name` (sft or rl) and runs it.

    Exit status 0; 1 for a run that failed; 2 for a mistake in the settings or the data; 143 for one that SIGTERM
    stopped. (3 is a run that `watchdog.py` ended.) Each is told in the last line.
    """
    try:
        config = compose(*arguments(f"verl_avar.training.{name}", name, argv))
        prepare(cpu=config.trainer.device == "cpu")
        run(config)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except Stopped as stopped:
        print(f"stopped: {one_line(stopped)}", file=sys.stderr)
        return EXIT_STOPPED
    except Exception as error:  # of verl, Ray, torch or vLLM
        traceback.print_exc()
        print(f"error: {one_line(error)}. The same command resumes from the newest checkpoint", file=sys.stderr)
        return EXIT_FAILED
    return 0


def one_line(error: BaseException, most: int = 300) -> str:
    """An exception in one line of `most` characters. One that crossed Ray processes holds their tracebacks; its cause
    was raised first."""
    while isinstance(cause := getattr(error, "cause", None), BaseException):
        error = cause
    text = " ".join(str(error).split()).removesuffix(".")
    if len(text) > most:
        text = f"{text[:most]} …"
    return text if isinstance(error, (RuntimeError, Stopped)) and text else f"{type(error).__name__}: {text}"
