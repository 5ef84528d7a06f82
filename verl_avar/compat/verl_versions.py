"""The verl versions that our patches and subclasses were written against and tested with."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version

from packaging.version import Version

TESTED = ("0.9.1", "0.9.1")  # first and last version, inclusive


@cache
def check() -> None:
    """Raises RuntimeError, naming the range, where the installed verl is outside of it."""
    installed = version("verl")
    if not Version(TESTED[0]) <= Version(installed) <= Version(TESTED[1]):
        span = TESTED[0] if TESTED[0] == TESTED[1] else f"{TESTED[0]} to {TESTED[1]}"
        raise RuntimeError(
            f"verl_avar patches verl {span}, but verl {installed} is installed; run `pip install verl=={TESTED[1]}`"
        )
