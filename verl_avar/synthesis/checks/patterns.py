"""Regular expressions of a config, compiled once."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from verl_avar.errors import ConfigError


def compile_all(expressions: Sequence[str], setting: str) -> tuple[re.Pattern, ...]:
    """Case-insensitive patterns of `checks.anchor.<setting>`. Raises ConfigError naming the one that is none."""
    return _compile(tuple(expressions), setting) if expressions else ()


@functools.lru_cache(maxsize=64)
def _compile(expressions: tuple[str, ...], setting: str) -> tuple[re.Pattern, ...]:
    patterns = []
    for expression in expressions:
        try:
            pattern = re.compile(expression, re.IGNORECASE)
        except re.error as error:
            raise ConfigError(f"checks.anchor.{setting}: '{expression}' is not a regular expression: {error}") from None
        if pattern.match(""):
            raise ConfigError(
                f"checks.anchor.{setting}: '{expression}' matches nothing at all, so it is found anywhere"
            )
        patterns.append(pattern)
    return tuple(patterns)


def simplified(text: str) -> str:
    """In small letters, runs of white space as one space, curly apostrophes straight: what the built-in ones expect."""
    return " ".join(text.lower().replace("’", "'").split())
