"""Waits for a turn or for time to pass that end early where no more requests are to be made."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from aiolimiter import AsyncLimiter

LOOK_S = 0.5  # between looks at whether to go on


class Stopping(Exception):
    """No more requests are to be made: the budget is spent, or the run was asked to end."""


async def turn(limiter: AsyncLimiter, amount: float, may_go: Callable[[], bool]) -> None:
    """Takes `amount` of a limiter once it has that much. Raises Stopping where `may_go` says so first."""
    while may_go():
        try:
            return await asyncio.wait_for(limiter.acquire(amount), LOOK_S)
        except asyncio.TimeoutError:
            continue
    raise Stopping


async def pause(seconds: float, may_go: Callable[[], bool]) -> None:
    """Sleeps; returns early where `may_go` says so."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and may_go():
        await asyncio.sleep(min(left, LOOK_S))
