"""Visual scores of rollouts that a weight update interrupts, for verl's asynchronous trainers.

verl's asynchronous client resumes an interrupted response as a new request and joins the parts, but hands on neither
part's `kv_transfer_params` (verl/workers/rollout/llm_server.py, FullyAsyncLLMServerClient.generate), not even where
there was one part. This client does.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient, LLMServerClient

from verl_avar.reward import SCORES

_parts: ContextVar[list[dict[str, Any]]] = ContextVar("parts of the response being generated")


class _KeepsParts(LLMServerClient):
    """Between verl's client that joins the parts and the one that asks a server for a part."""

    async def generate(self, request_id, **kwargs):
        output = await super().generate(request_id, **kwargs)
        if params := output.extra_fields.get("kv_transfer_params"):
            _parts.get().append(params)
        return output


class ScoredAsyncClient(FullyAsyncLLMServerClient, _KeepsParts):
    """verl's asynchronous client; its output has `extra_fields["kv_transfer_params"]` with the parts' joint score."""

    async def generate(self, request_id, **kwargs):
        token = _parts.set([])
        try:
            output = await super().generate(request_id, **kwargs)
            parts = _parts.get()
        finally:
            _parts.reset(token)
        if parts:
            output.extra_fields["kv_transfer_params"] = parts[-1] | joint_score(parts)
        return output


def joint_score(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """`visual_attention` of a response from its parts' `kv_transfer_params`, or {} where none has it.

    A score is a mean over response queries, so the joint score is the mean over the parts' weighted by their `n`. vLLM
    scores no part that was aborted: the joint score is that of the other parts, its `n` counts their queries alone, and
    `unscored` the rest. Per-token scores (`tokens`) of a joint score are left out.
    """
    scores = [part["visual_attention"] for part in parts if part.get("visual_attention")]
    measured = [score for score in scores if score["visual_mass"] is not None and score["n"]]
    if not scores:
        return {}
    if len(scores) == 1 or not measured:
        return {"visual_attention": scores[-1]}
    n = sum(score["n"] for score in measured)
    joint = {name: _mean([(score[name], score["n"]) for score in measured]) for name in SCORES}
    joint |= {"n": n, "unscored": sum(score["n"] for score in scores) - n}
    if joint["ratio"] is None:
        joint["reason"] = next(score["reason"] for score in measured if score["ratio"] is None)
    return {"visual_attention": joint}


def _mean(values: list[tuple[float | None, int]]) -> float | None:
    if any(value is None for value, _ in values):
        return None
    return sum(value * n for value, n in values) / sum(n for _, n in values)
