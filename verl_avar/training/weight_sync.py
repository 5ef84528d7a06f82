"""Weight syncs that fail instead of hanging: verl's client of a vLLM server, in its rollout registry by `plugin.py`.

verl's actor waits for vLLM to take each bucket of weights. Where vLLM could not load one, or is dead, it waits for
ever, and vLLM's own error is never asked for (verl/workers/rollout/vllm_rollout/vllm_rollout.py, update_weights).
"""

from __future__ import annotations

import asyncio

import zmq
from verl.workers.rollout.vllm_rollout import ServerAdapter

from verl_avar.compat.verl_weight_socket import of_this_run
from verl_avar.training.command import one_line

BUCKET_S = 80.0  # for one bucket of some hundred MiB, which takes below a second
CAUSE_S = 10.0  # for the answer of a vLLM server that did not take a bucket


class ImpatientServerAdapter(ServerAdapter):
    """verl's client of a vLLM server inside the actor's worker."""

    bucket_s, cause_s = BUCKET_S, CAUSE_S

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.zmq_handle = of_this_run(self.zmq_handle)

    async def _execute_method(self, method, non_block=False, **kwargs):
        answer = await super()._execute_method(method, non_block=non_block, **kwargs)
        if non_block:
            self._loading = answer
        return answer

    async def update_weights(self, *args, **kwargs):
        """Raises RuntimeError where vLLM does not take a bucket in time, with vLLM's own error as its cause."""
        self._loading = None
        _limit_sockets(int(1000 * self.bucket_s))
        try:
            return await super().update_weights(*args, **kwargs)
        except zmq.Again:
            message = f"weight sync: vLLM took no weights for {self.bucket_s:.0f} s"
            raise RuntimeError(f"{message}: {await self._cause()}") from None
        finally:
            _limit_sockets(-1)

    async def _cause(self) -> str:
        """vLLM's answer to the loading that this rank asked for."""
        if self._loading is None:
            return "the rank that asked it says why"
        try:
            await asyncio.wait_for(self._answer(), self.cause_s)
        except TimeoutError:
            return "it does not say why"
        except Exception as error:  # whatever vLLM's loader or Ray raised
            return one_line(error)
        return "it says that it has them all"

    async def _answer(self):
        return await self._loading


def _limit_sockets(milliseconds: int) -> None:
    """How long sockets that verl's sender makes from now on wait for their peer; -1: for ever."""
    context = zmq.Context.instance()
    for option in (zmq.RCVTIMEO, zmq.SNDTIMEO):  # vLLM may not even have connected
        context.setsockopt(option, milliseconds)
    context.setsockopt(zmq.LINGER, min(milliseconds, 0))  # a process that gives up leaves without its last words
