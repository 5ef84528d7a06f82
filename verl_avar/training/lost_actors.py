"""Notices Ray actors that died, such as an actor's worker or a vLLM server.

verl hears of a dead worker with its next call of it, which may wait for another one that waits for the dead one.
"""

from __future__ import annotations

import time

import ray
from ray.util import list_named_actors


class LostActors:
    """Called again and again, says which named actors of this job were there before and are gone.

    verl names the actors of its worker groups, servers and agent loops; each job has a namespace of its own.
    patience_s: how long an actor has to be gone, for verl's own error to come first, and a run to end as it should.
    """

    def __init__(self, patience_s: float = 30.0):
        self.patience_s = patience_s
        self.seen: set[str] = set()
        self.since: dict[str, float] = {}  # when each was first found gone, in seconds of the monotonic clock

    def __call__(self) -> str | None:
        if not ray.is_initialized():
            return None
        alive, now = set(list_named_actors()), time.monotonic()
        self.seen |= alive
        self.since = {name: self.since.get(name, now) for name in self.seen - alive}
        lost = sorted(name for name, since in self.since.items() if now - since >= self.patience_s)
        if not lost:
            return None
        return (
            f"{', '.join(lost)} died; why is in the lines above, or in Ray's logs (an out-of-memory kill shows there)"
        )
