"""Every finished response has its `visual_attention`: one per choice with n > 1, and a reason where there is no score.

Why: with n > 1 each choice is a request of its own to the engine, and vLLM hands on the connector's result of the one
that ends last; a request that ends outside of the engine (a stop string, an abort) comes back without any.
Where: vllm/v1/engine/output_processor.py, `RequestState.from_new_request` and `.make_request_output`.
Versions: vLLM 0.24 to 0.33.
Can go: when vLLM keeps `kv_transfer_params` per choice and asks the connector about aborted requests.
"""

from __future__ import annotations

from functools import wraps
from typing import Any


def apply() -> None:
    """Wrap both once. Idempotent."""
    from vllm.v1.engine.output_processor import RequestState

    from verl_avar.rollout.request import has_options

    stock_new, stock_output = RequestState.from_new_request.__func__, RequestState.make_request_output
    if getattr(stock_output, "scores_every_choice", False):
        return

    @wraps(stock_new)
    def from_new_request(cls, tokenizer, request, *args, **kwargs):
        state = stock_new(cls, tokenizer, request, *args, **kwargs)
        state.is_scored = has_options(request)
        return state

    @wraps(stock_output)
    def make_request_output(
        self, new_token_ids, pooling_output, finish_reason, stop_reason, kv_transfer_params=None, *args, **kwargs
    ):
        if self.is_scored:
            kv_transfer_params = with_score(self, finish_reason, stop_reason, kv_transfer_params)
        return stock_output(
            self, new_token_ids, pooling_output, finish_reason, stop_reason, kv_transfer_params, *args, **kwargs
        )

    make_request_output.scores_every_choice = True
    RequestState.is_scored = False  # one that something else builds
    RequestState.from_new_request = classmethod(from_new_request)
    RequestState.make_request_output = make_request_output


def with_score(
    state: Any, finish_reason: Any, stop_reason: Any, params: dict[str, Any] | None
) -> dict[str, Any] | None:
    """`kv_transfer_params` of the next output of a `RequestState`.

    With n > 1, `visual_attention` is a list with one entry per choice, None for those that are not finished, in every
    output after the first finished choice: vLLM keeps the last output's when it merges some.
    """
    from verl_avar.rollout.request import STOP_STRING, unscored

    if finish_reason is not None and "visual_attention" not in (params or {}):
        reason = STOP_STRING if isinstance(stop_reason, str) else f"the request ended early ({finish_reason})"
        params = {**(params or {}), "visual_attention": unscored(state.detokenizer.num_output_tokens(), reason)}
    parent = state.parent_req
    if parent is None:
        return params
    scores = parent.__dict__.setdefault("visual_attention", [None] * parent.n)
    if finish_reason is not None:
        scores[state.request_index] = params["visual_attention"]
    return {**(params or {}), "visual_attention": list(scores)} if any(scores) else params
