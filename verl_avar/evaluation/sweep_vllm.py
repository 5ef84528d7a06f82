"""The backend of a sweep on vLLM, in this process (`sweep_engine`) or on a server (`sweep_server`): many requests at a
time, each with its own bias, and their scores from vLLM's own attention.

Same prompts, greedy decoding, limits and end markers as on transformers, so that the records are the same.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from verl_avar.evaluation.checkpoint import Checkpoint
from verl_avar.evaluation.isolation import isolated
from verl_avar.evaluation.sweep import Strength, Task
from verl_avar.evaluation.sweep_prompts import Prompt, Prompts

FEWEST_FAILURES = 8  # in a row, before a sweep gives up on an engine


@dataclass(frozen=True)
class Reply:
    """What vLLM answered: ids of prompt and answer (the end marker included), why it ended, and
    `kv_transfer_params["visual_attention"]`.
    """

    prompt_ids: list[int] | None
    ids: list[int] | None
    finish: str | None
    attention: dict | None


class Unanswered(ValueError):
    """A good request that got no answer: the engine's fault, and perhaps passing."""


class Engine(Protocol):
    """Where requests go."""

    where: str  # for error messages
    remedy: str  # what to do where it runs without the connector

    def request(self, prompt: Prompt, strength: Strength) -> Any:
        """Builds a request, in a thread of its own."""

    async def answer(self, request: Any) -> Reply:
        """Raises ValueError for a request that is refused, RuntimeError where no other could be answered either."""

    async def close(self) -> None: ...


class VllmBackend:
    """Runs tasks on an engine, `concurrency` of them at a time. To be closed."""

    def __init__(self, prompts: Prompts, engine: Engine, concurrency: int):
        self.prompts, self.engine, self.concurrency = prompts, engine, concurrency
        self._loop = asyncio.new_event_loop()
        self._thread = ThreadPoolExecutor(1)  # for all that processor and tokenizer do: neither is made for several
        self._running: dict[asyncio.Task, Task] = {}
        self._failures = 0

    def __call__(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, dict]]:
        """A `sweep.Backend`. Raises RuntimeError where it can't go on; what was answered has been yielded then."""
        # Row by row: a row's pictures are prepared once for all points.
        waiting = iter(sorted(tasks, key=lambda task: task.number))
        running = self._running
        try:
            while True:
                for task in itertools.islice(waiting, self.concurrency - len(running)):
                    running[self._loop.create_task(self._record(task))] = task
                if not running:
                    return
                done, _ = self._loop.run_until_complete(asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED))
                for each in sorted(done, key=lambda each: each.exception() is not None):
                    yield running.pop(each), each.result()
        finally:
            self._cancel()

    def close(self) -> None:
        """Ends the engine. Requests in flight are dropped."""
        if self._loop.is_closed():
            return
        self._cancel()
        try:
            self._loop.run_until_complete(self.engine.close())
        finally:
            self._thread.shutdown()
            self._loop.close()

    def _cancel(self) -> None:
        if not self._running:
            return
        for each in self._running:
            each.cancel()
        self._loop.run_until_complete(asyncio.gather(*self._running, return_exceptions=True))
        self._running.clear()

    async def _record(self, task: Task) -> dict:
        prepared = await self._loop.run_in_executor(self._thread, self._prepare, task)
        if isinstance(prepared, str):
            return {"problem": prepared}
        prompt, request = prepared
        try:
            reply = await self.engine.answer(request)
            record = await self._loop.run_in_executor(self._thread, self._read, task, prompt, reply)
            self._failures = 0
        except ValueError as error:
            problem = " ".join(str(error).split())[:300]
            self._failures += isinstance(error, Unanswered)
            if self._failures >= max(FEWEST_FAILURES, self.concurrency):
                raise RuntimeError(
                    f"{self._failures} requests to {self.engine.where} failed one after the other, the last (row "
                    f"{task.row.id}): {problem}"
                ) from None
            return {"problem": problem}
        return record

    def _read(self, task: Task, prompt: Prompt, reply: Reply) -> dict:
        check_reply(self.prompts.checkpoint, prompt, reply, self.engine, f"row {task.row.id}")
        return as_record(self.prompts.checkpoint, prompt, reply, self.engine.where)

    def _prepare(self, task: Task) -> tuple[Prompt, Any] | str:
        def work(tasks: Sequence[Task]) -> list[tuple[Prompt, Any]]:
            prompts = [self.prompts.of(each) for each in tasks]
            return [(p, self.engine.request(p, each.strength)) for p, each in zip(prompts, tasks, strict=True)]

        ((_, prepared),) = isolated([task], work)
        return prepared


def check_reply(checkpoint: Checkpoint, prompt: Prompt, reply: Reply, engine: Engine, name: str) -> None:
    """Raises RuntimeError where the engine answered another prompt, or without the connector: no answer of it counts.

    name: of the prompt.
    """
    if reply.prompt_ids is None or reply.ids is None:
        raise RuntimeError(f"{engine.where} returns no token ids: it is no vLLM server, or one older than 0.24")
    if reply.prompt_ids != prompt.ids:
        raise RuntimeError(f"{name}: {_different(checkpoint, prompt.ids, reply.prompt_ids, engine.where)}")
    if reply.attention is None:
        raise RuntimeError(f"{engine.where} runs without the visual-attention connector: {engine.remedy}")


def as_record(checkpoint: Checkpoint, prompt: Prompt, reply: Reply, where: str) -> dict:
    """The record of an answer (see `sweep.Backend`). Raises ValueError where it is not what transformers would give."""
    ids, attention = reply.ids, reply.attention
    ended = bool(ids) and ids[-1] in prompt.ends
    if images := checkpoint.template.visual.intersection(ids):
        token = checkpoint.tokenizer.convert_ids_to_tokens(min(images))
        raise ValueError(f"the response holds {token}, the model's placeholder for an image")
    if not ended and len(ids) < prompt.limit:
        raise ValueError(
            f"{where} ended the answer after {len(ids)} of {prompt.limit} tokens ({reply.finish}): is its "
            "max_model_len smaller than prompt and answer?"
        )
    if attention["visual_mass"] is None or attention["n"] != len(ids):
        raise ValueError(f"{where} gave no scores for this answer: {attention.get('reason')}")
    return {
        "response": checkpoint.tokenizer.decode(ids[:-1] if ended else ids),
        "tokens": len(ids),
        "cut": not ended,
        "queries": attention["n"],
        "vas": attention["vas"],
        "head_mean": attention["ratio"],
        "visual": attention["visual_mass"],
        "system": attention["system_mass"],
    }


def _different(checkpoint: Checkpoint, wanted: list[int], got: list[int], where: str) -> str:
    """In which tokens two prompts differ, in words."""
    pairs = enumerate(itertools.zip_longest(wanted, got))
    first = next(position for position, (a, b) in pairs if a != b)
    a, b = (repr(checkpoint.tokenizer.decode(ids[max(0, first - 4) : first + 8])) for ids in (wanted, got))
    return (
        f"{where} makes another prompt of it than this checkpoint's template and processor, from token {first} on: "
        f"{b} of {len(got)} tokens instead of {a} of {len(wanted)}; is it the same model, with its own chat template "
        "and image settings?"
    )
