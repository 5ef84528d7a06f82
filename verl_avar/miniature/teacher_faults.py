"""What can go wrong with the exact teacher's endpoint, each with a probability, and its rate limit.

Transport faults are drawn anew for every request, so that a retry gets another draw. Content faults hang on what is
asked, so that the same request always has the same text; another `seed` in the request is another draw.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from verl_avar.errors import ConfigError

TRANSPORT = {
    "rate_limit": "429 with Retry-After",
    "server_error": "500",
    "timeout": "holds the request, then 504",
    "cut": "closes the connection in the middle of the body",
    "malformed": "200 with JSON that breaks off",
    "slow": "the right answer, late",
}
CONTENT = {
    "wrong_answer": ("reason",),  # kind: the stages that it happens in
    "leak": ("anchor",),  # an appeal to the description survives
    "refusal": ("describe", "reason", "anchor"),
}


@dataclass(frozen=True)
class Faults:
    """Probabilities by kind; kinds exclude each other, so those that one request can meet add up to 1 at most.

    Raises ConfigError for unknown kinds and for numbers that are no such probabilities.
    """

    rates: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self):
        known = (*TRANSPORT, *CONTENT)
        for kind, rate in self.rates.items():
            if kind not in known:
                raise ConfigError(f"unknown fault '{kind}'; known are {', '.join(known)}")
            if not 0 <= rate <= 1:
                raise ConfigError(f"fault {kind} has the probability {rate}; wanted 0 to 1")
        for group in (TRANSPORT, *(_of_stage(stage) for stage in CONTENT["refusal"])):
            if (total := sum(self.rates.get(kind, 0.0) for kind in group)) > 1 + 1e-9:
                raise ConfigError(f"the probabilities of {', '.join(group)} add up to {total:g}, more than 1")

    def transport(self, rng: random.Random) -> str | None:
        return self._drawn(TRANSPORT, rng)

    def content(self, stage: str, rng: random.Random) -> str | None:
        return self._drawn(_of_stage(stage), rng)

    def _drawn(self, kinds: Iterable[str], rng: random.Random) -> str | None:
        point = rng.random()
        for kind in kinds:
            point -= self.rates.get(kind, 0.0)
            if point < 0:
                return kind
        return None


def parse(text: str) -> Faults:
    """Of "rate_limit=0.05,cut=0.05"; none of an empty text. Raises ConfigError."""
    rates = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        kind, _, rate = part.partition("=")
        try:
            rates[kind] = float(rate)
        except ValueError:
            raise ConfigError(f"'{part}' is not KIND=PROBABILITY, such as cut=0.05") from None
    return Faults(rates)


def _of_stage(stage: str) -> list[str]:
    return [kind for kind, stages in CONTENT.items() if stage in stages]


class Bucket:
    """A token bucket: `per_minute` requests a minute on average, at most a second's worth (at least 1) at once."""

    def __init__(self, per_minute: float):
        self.per_second = per_minute / 60
        self.capacity = max(1.0, self.per_second)
        self.tokens, self._at = self.capacity, float("-inf")

    def take(self, now: float) -> float:
        """Takes a token at the time `now` (seconds) and returns 0; where there is none, the seconds until there is."""
        self.tokens = min(self.capacity, self.tokens + (now - self._at) * self.per_second)
        self._at = now
        if self.tokens >= 1:
            self.tokens -= 1
            return 0.0
        return (1 - self.tokens) / self.per_second
