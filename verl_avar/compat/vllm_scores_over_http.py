"""`visual_attention` of every choice reaches the client of the OpenAI server, and options never vanish on the way in.

Why: vLLM's server returns `kv_transfer_params` of one result per response: a completion of several prompts has that of
the first, a batch of chats none, a stream none before vLLM 0.33 and there that of all choices so far. Beam search drops
`vllm_xargs`; fields that the server does not know are ignored; true and false become numbers.
Where: below vllm/entrypoints/openai/, {chat_completion,completion,responses}/protocol.py,
{chat_completion,completion}/serving.py and chat_completion/batch_serving.py.
Versions: vLLM 0.24 to 0.33.
Can go: when `kv_transfer_params` is a field of a choice; the checks, when the server refuses what it ignores.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing, contextmanager
from functools import cache, wraps
from typing import Any

from verl_avar.compat.on_import import on_import
from verl_avar.rollout.options import OPTION_KEYS, RequestOptions

API = "vllm.entrypoints.openai"


@cache
def apply() -> None:
    """Patch the modules when they are imported. Idempotent."""
    on_import(f"{API}.chat_completion.protocol", after(lambda module: check_options(module.ChatCompletionRequest)))
    on_import(f"{API}.completion.protocol", after(lambda module: check_options(module.CompletionRequest)))
    on_import(f"{API}.responses.protocol", after(lambda module: check_options(module.ResponsesRequest)))
    on_import(f"{API}.chat_completion.serving", after(lambda module: patch_chat(module.OpenAIServingChat)))
    on_import(f"{API}.completion.serving", after(lambda module: patch_completion(module.OpenAIServingCompletion)))
    on_import(f"{API}.chat_completion.batch_serving", after(lambda module: patch_batch(module.OpenAIServingChatBatch)))


def after(patch: Callable[[Any], None]):
    @contextmanager
    def around(module):
        yield
        patch(module)

    return around


# In


def check_options(request_class: type) -> None:
    from pydantic import BeforeValidator
    from vllm.exceptions import VLLMValidationError

    def check_values(values: Any) -> Any:
        if isinstance(values, dict):
            try:
                RequestOptions.from_mapping({key: values[key] for key in OPTION_KEYS if key in values})
            except ValueError as error:
                raise VLLMValidationError(str(error)) from error
        return values

    # Before the field's own type, which turns a boolean into a number and names null and objects less clearly.
    request_class.model_fields["vllm_xargs"].metadata.append(BeforeValidator(check_values))
    request_class.model_rebuild(force=True)

    def checked(name: str, beams: bool) -> None:
        stock = getattr(request_class, name)

        @wraps(stock)
        def params(self, *args, **kwargs):
            if astray := [key for key in OPTION_KEYS if key in (self.model_extra or {})]:
                raise VLLMValidationError(f"{', '.join(astray)}: options of visual attention belong in vllm_xargs")
            if beams and (dropped := [key for key in OPTION_KEYS if key in (self.vllm_xargs or {})]):
                raise VLLMValidationError(f"{', '.join(dropped)}: vLLM's beam search takes no options per request")
            return stock(self, *args, **kwargs)

        setattr(request_class, name, params)

    checked("to_sampling_params", beams=False)
    if hasattr(request_class, "to_beam_search_params"):
        checked("to_beam_search_params", beams=True)


# Out


def patch_chat(serving: type) -> None:
    add_reason_to_beams(serving)
    stock = serving.chat_completion_stream_generator

    @wraps(stock)
    def chat_completion_stream_generator(self, request, result_generator, *args, **kwargs):
        check_stream(self, request)
        scores: dict[int, dict] = {}
        results = Watched(result_generator, lambda result: scores.update(choice_scores(result)))
        return scored_stream(stock(self, request, results, *args, **kwargs), scores)

    serving.chat_completion_stream_generator = chat_completion_stream_generator


def patch_completion(serving: type) -> None:
    add_reason_to_beams(serving)
    stock_stream, stock_response = serving.completion_stream_generator, serving.request_output_to_completion_response

    @wraps(stock_stream)
    def completion_stream_generator(self, request, engine_inputs, result_generator, *args, **kwargs):
        check_stream(self, request)
        scores: dict[int, dict] = {}

        def note(numbered) -> None:
            prompt, result = numbered
            scores.update(choice_scores(result, first=prompt * (request.n or 1)))

        results = Watched(result_generator, note)
        return scored_stream(stock_stream(self, request, engine_inputs, results, *args, **kwargs), scores)

    @wraps(stock_response)
    def request_output_to_completion_response(self, final_res_batch, *args, **kwargs):
        response = stock_response(self, final_res_batch, *args, **kwargs)
        if len(final_res_batch) > 1:
            set_scores(response, final_res_batch)
        return response

    serving.completion_stream_generator = completion_stream_generator
    serving.request_output_to_completion_response = request_output_to_completion_response


def patch_batch(serving: type) -> None:
    stock = serving.chat_completion_full_generator_batch

    @wraps(stock)
    async def chat_completion_full_generator_batch(self, request, generators, *args, **kwargs):
        final: dict[int, Any] = {}
        watched = [
            Watched(results, lambda result, chat=chat: final.update({chat: result}))
            for chat, results in enumerate(generators)
        ]
        response = await stock(self, request, watched, *args, **kwargs)
        if hasattr(response, "choices"):  # not an ErrorResponse
            set_scores(response, [final[chat] for chat in sorted(final)])
        return response

    serving.chat_completion_full_generator_batch = chat_completion_full_generator_batch


def add_reason_to_beams(serving: type) -> None:
    from verl_avar.rollout import requested
    from verl_avar.rollout.request import unscored

    stock = serving.beam_search

    @wraps(stock)
    async def beam_search(self, *args, **kwargs):
        async for result in stock(self, *args, **kwargs):
            if requested(self.engine_client.vllm_config):
                scores = [unscored(len(beam.token_ids), "beam search has no scores") for beam in result.outputs]
                result.kv_transfer_params = {"visual_attention": scores[0] if len(scores) == 1 else scores}
            yield result

    serving.beam_search = beam_search


def check_stream(server: Any, request: Any) -> None:
    """Bad options are an error now: once the engine finds them, the stream has begun with a 200."""
    from vllm.exceptions import VLLMValidationError

    from verl_avar.rollout.request import request_options

    try:
        request_options(server.engine_client.vllm_config, request.vllm_xargs, request.stop)
    except ValueError as error:
        raise VLLMValidationError(str(error)) from error


async def scored_stream(pieces: AsyncGenerator[str, None], scores: dict[int, dict]) -> AsyncGenerator[str, None]:
    async with aclosing(pieces):
        async for piece in pieces:
            yield add_score(piece, scores)


class Watched:
    """A request's results, shown to `note` on their way. No generator: that would stand between a client that leaves
    and the request that ends with it."""

    def __init__(self, results: AsyncGenerator, note: Callable[[Any], None]):
        self._results, self._note = results, note

    def __aiter__(self) -> Watched:
        return self

    async def __anext__(self):
        result = await anext(self._results)
        self._note(result)
        return result

    async def aclose(self) -> None:
        await self._results.aclose()


def score_list(result: Any) -> list[dict | None]:
    """One entry per choice of a `RequestOutput`; empty where there is none."""
    scores = (result.kv_transfer_params or {}).get("visual_attention")
    return scores if isinstance(scores, list) else [scores] if scores else []


def choice_scores(result: Any, first: int = 0) -> dict[int, dict]:
    """Scores by number of the choice, of those choices that this `RequestOutput` finishes."""
    scores = score_list(result)
    return {first + output.index: scores[output.index] for output in result.outputs if output.finished() and scores}


def set_scores(response: Any, results: Iterable[Any]) -> None:
    if scores := [score for result in results for score in score_list(result)]:
        response.kv_transfer_params = {**(response.kv_transfer_params or {}), "visual_attention": scores}


def add_score(piece: str, scores: dict[int, dict]) -> str:
    """A piece of an event stream, with the score of the choice that it finishes."""
    if not scores or not piece.startswith("data: {"):
        return piece
    chunk = json.loads(piece.removeprefix("data: "))
    ended = [choice["index"] for choice in chunk.get("choices", ()) if choice.get("finish_reason") is not None]
    if not ended or ended[0] not in scores:
        return piece
    params = {**(chunk.get("kv_transfer_params") or {}), "visual_attention": scores.pop(ended[0])}
    return f"data: {json.dumps(chunk | {'kv_transfer_params': params}, ensure_ascii=False, separators=(',', ':'))}\n\n"
