"""The socket of a weight sync is this run's own.

Why: verl names it after Ray's job id, which is 01000000 in every new cluster. Two runs on one machine, each with a Ray
of its own, take one another's weights, or wait for ever.
Where: verl/workers/rollout/vllm_rollout/vllm_rollout.py:141 (the actor's end, ours in training/weight_sync.py) and
utils.py:416 (vLLM's end, patched here).
Versions: verl 0.9.1.
Applies to: runs with RUN in their environment, which training/environment.py sets.
Can go: when verl's name differs between clusters.
"""

from __future__ import annotations

import os
from contextlib import contextmanager

from verl_avar.compat.on_import import on_import

RUN = "VERL_AVAR_RUN"


def apply() -> None:
    """Patch vLLM's workers under verl when their module is imported."""
    on_import("verl.workers.rollout.vllm_rollout.utils", patch)


def of_this_run(socket: str) -> str:
    """verl's name of a socket with the run in it."""
    run = os.environ.get(RUN)
    return socket.replace("/rl-colocate-zmq-", f"/rl-colocate-zmq-{run}-") if run else socket


@contextmanager
def patch(module):
    yield
    extension = module.vLLMColocateWorkerExtension
    stock = extension._get_zmq_handle
    if not getattr(stock, "of_this_run", False):

        def named(self) -> str:
            return of_this_run(stock(self))

        named.of_this_run = True
        extension._get_zmq_handle = named
