"""What a run of a harness is told, and the environment that it finds."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_avar.data.schema import SYSTEM
from verl_avar.errors import ConfigError

ENVIRONMENT = ".venv-eval"  # beside .venv, as recipes/bootstrap.sh eval makes it
PYTHON_VARIABLE = "AVAR_EVAL_PYTHON"
LONG_ANSWER = 16384  # tokens, told to a harness that wants a limit where the protocol has none


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server. url: ends with /v1. key_env: the environment variable of its key, None: no key."""

    url: str
    model: str
    key_env: str | None = None

    def headers(self) -> dict[str, str]:
        """Raises ConfigError where the environment lacks the key."""
        if self.key_env is None:
            return {}
        if not (key := os.environ.get(self.key_env, "").strip()):
            raise ConfigError(f"endpoint {self.url}: the environment has no {self.key_env}")
        return {"Authorization": f"Bearer {key}"}


@dataclass(frozen=True)
class Protocol:
    """What every request of a harness becomes, whatever its own defaults are."""

    system: str | None = SYSTEM  # replaces the harness's system turn; None leaves that
    template: str = "{question}"  # of the harness's own text
    # At least so many: the harnesses' defaults cut a chain of thought at 128 or 1024. None: what the context leaves.
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None  # of repeat 0, sent where the temperature is above 0; the n-th repeat adds n
    extra: dict[str, Any] = field(default_factory=dict)  # more fields of a request: top_k, vllm_xargs

    def __post_init__(self) -> None:
        if "{question}" not in self.template:
            raise ConfigError(f"template {self.template!r}: write {{question}} where the harness's text goes")


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of the harness. file: a local copy; None: the harness has it or gets it.

    VLMEvalKit: `file` is a TSV in its format, `kind` the name of its class that knows the format and scores it
    (MathVista, MMMUDataset, …), needed where the harness can't tell by `name`. lmms-eval: `file` is a Parquet of
    schema.QUESTIONS, and `kind` is not used.
    """

    name: str
    file: Path | None = None
    kind: str | None = None
    # What is in the file, as rows of schema.QUESTIONS in its order; None: it is read from there.
    questions: Sequence[dict] | None = None
    prefix: str = ""  # of an id, before what the harness calls the question


@dataclass(frozen=True)
class HarnessSettings:
    """What a driver is told. out: the model's folder of the run; files go to out/harness/NAME."""

    out: Path
    server: Endpoint
    benchmarks: tuple[Benchmark, ...]
    protocol: Protocol = Protocol()
    judge: Endpoint | None = None  # None: rules only, and a scorer that asks a judge is refused one
    path: Path | None = None  # checkout of VLMEvalKit
    python: Path | None = None  # interpreter of the harness's environment
    concurrency: int = 8
    timeout_s: float = 1800.0  # of one answer
    repeats: int = 1
    identity: str = ""  # of the model's weights: other weights under the same name are asked anew
    progress: Callable[[int], Any] = lambda answered: None  # told of each answer, stored or new


def harness_python(python: Path | None = None) -> Path:
    """The interpreter of the harnesses' environment: as given, of $AVAR_EVAL_PYTHON, or of .venv-eval here or at the
    root of the repository. Raises ConfigError."""
    named = python or os.environ.get(PYTHON_VARIABLE)
    if named:
        path = Path(named)
        if not os.access(path, os.X_OK) or path.is_dir():
            raise ConfigError(f"{path}: is no Python interpreter; name bin/python of the harnesses' environment")
        return path.absolute()  # not resolved: a link tells Python its environment
    root = Path(__file__).resolve().parents[4]
    for folder in (Path.cwd(), root):
        path = folder / ENVIRONMENT / "bin" / "python"
        if path.is_file():
            return path
    raise ConfigError(
        f"the harnesses have an environment of their own, and there is no {ENVIRONMENT}: make it by "
        f"`bash recipes/bootstrap.sh eval`, or name its interpreter by --harness-python or {PYTHON_VARIABLE}"
    )


def commit_of(path: Path) -> str:
    """Eight digits of a checkout's commit, "unknown" where it is none (an archive of the source)."""
    command = ["git", "-C", str(path), "rev-parse", "--short=8", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
