"""An endpoint's stated rates: how long a call waits until requests and tokens of this minute allow it."""

from __future__ import annotations

import asyncio

from aiolimiter import AsyncLimiter

TOKEN_WINDOW_S = 10.0  # tokens are let through in shares of the minute: a whole minute's at once would be refused
FIRST_TOKENS = 1000.0  # a call's tokens, until some are known
REQUEST_WINDOW_S = 0.5


class Limits:
    """To be used within one event loop. None: no limit."""

    def __init__(self, requests_per_minute: float | None, tokens_per_minute: float | None):
        self.requests = requests_per_minute and AsyncLimiter(*_window(requests_per_minute))
        self.tokens = tokens_per_minute and AsyncLimiter(tokens_per_minute * TOKEN_WINDOW_S / 60, TOKEN_WINDOW_S)
        self.turn = asyncio.Lock()  # one after the other: AsyncLimiter lets small calls go before large ones
        self.means: dict[str, float] = {}  # tokens of a model's calls
        self.owed = 0.0  # tokens of calls beyond what was taken for them; below 0: what they left

    def expected(self, model: str) -> float:
        """Tokens that are taken for a call before it is made."""
        return self.means.get(model, FIRST_TOKENS)

    async def tokens_for(self, model: str) -> float:
        """Waits until there are enough; returns how many were taken."""
        expected = self.expected(model)
        if self.tokens:
            taken = min(max(0.0, expected + self.owed), self.tokens.max_rate)
            self.owed += expected - taken
            await self.tokens.acquire(taken)
        return expected

    def used(self, model: str, expected: float, tokens: int) -> None:
        """What a call took in the end: the next ones wait for the difference, or not so long."""
        self.means[model] = 0.9 * self.means[model] + 0.1 * tokens if model in self.means else tokens
        if self.tokens:
            self.owed = max(self.owed + tokens - expected, -self.tokens.max_rate)


def _window(per_minute: float) -> tuple[float, float]:
    """(requests, seconds) of a limit in windows short enough that a server's own window never sees a burst."""
    seconds = max(REQUEST_WINDOW_S, 60 / per_minute)
    return max(1.0, per_minute * seconds / 60), seconds
