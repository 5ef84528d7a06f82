"""A running vLLM server for a sweep, through its OpenAI API: one started by `avar serve`."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import openai

from verl_avar.evaluation.checkpoint import Checkpoint
from verl_avar.evaluation.partial import fingerprint
from verl_avar.evaluation.sweep import Strength
from verl_avar.evaluation.sweep_prompts import Prompt, Prompts
from verl_avar.evaluation.sweep_vllm import Reply, Unanswered, check_reply

REFUSED = (400, 413, 422)  # this request
USELESS = (401, 403, 404, 405)  # every request
CONNECT_S = 10.0
ATTEMPTS, PAUSE_S = 3, 1.0  # of a request whose connection breaks
HOLLOW = Strength("probe", 0.0, 0.0)
QUESTION = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]


class ServerEngine:
    """A server that has been looked at (`connect`). Requests go to it as chat completions."""

    def __init__(self, url: str, model: str, timeout: float):
        self.where, self.remedy = f"the server at {url}", "start it with `avar serve MODEL`"
        self._model, self._timeout = model, timeout
        self._client = openai.AsyncOpenAI(**_settings(url, timeout))

    def request(self, prompt: Prompt, strength: Strength) -> dict:
        """Arguments of the client's `chat.completions.create`."""
        return body(self._model, prompt, strength)

    async def answer(self, request: dict) -> Reply:
        """Raises ValueError for a request that is refused or not answered, RuntimeError where the server is gone."""
        for attempt in range(ATTEMPTS):
            try:
                return read(await self._client.chat.completions.create(**request))
            except openai.APITimeoutError:
                raise Unanswered(f"{self.where} gave no answer within {self._timeout:g} s") from None
            except openai.APIConnectionError as error:
                if attempt + 1 == ATTEMPTS:
                    raise RuntimeError(f"{self.where} is gone: {_cause(error)}") from None
                await asyncio.sleep(PAUSE_S)
            except openai.APIStatusError as error:
                raise _refusal(self.where, error) from None
        raise AssertionError("every attempt returns or raises")

    async def close(self) -> None:
        await self._client.close()


def connect(
    url: str, checkpoint: Checkpoint, model: str, served: str | None = None, timeout: float = 600.0
) -> ServerEngine:
    """A server, after one short request: that it serves this model, with the connector, and makes the same prompts.

    url: http://HOST:PORT. model: the checkpoint's path or name. served: the server's name of it, by default the model
    that it loaded from a place of that name. timeout: seconds for one answer. Raises ValueError or RuntimeError, in one
    line, where something of that is not so.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"--server {url}: write http://HOST:PORT")
    url = url.rstrip("/")
    url = url if url.endswith("/v1") else f"{url}/v1"
    engine_url = url.removesuffix("/v1")
    where = f"the server at {engine_url}"
    with openai.OpenAI(**_settings(url, timeout)) as client:
        try:
            name = served or _served(where, client, model)
            prompt = Prompts(checkpoint, max_new_tokens=1).make(QUESTION, [])
            reply = read(client.chat.completions.create(**body(name, prompt, HOLLOW)))
        except openai.APIStatusError as error:
            if "without the visual-attention connector" in error.message:
                raise RuntimeError(
                    f"{where} runs without the visual-attention connector: start it with `avar serve MODEL`"
                ) from None
            raise RuntimeError(str(_refusal(where, error))) from None
        except openai.APIConnectionError as error:
            raise RuntimeError(
                f"no server answers at {engine_url} ({_cause(error)}): start one with `avar serve MODEL`"
            ) from None
        except openai.OpenAIError as error:
            raise RuntimeError(f"{where}: {error}") from None
    engine = ServerEngine(url, name, timeout)
    engine.where = where
    check_reply(checkpoint, prompt, reply, engine, "a first question")
    return engine


def body(model: str, prompt: Prompt, strength: Strength) -> dict[str, Any]:
    """A greedy chat completion; the server's own defaults, of its generation config or its options, count nowhere."""
    return {
        "model": model,
        "messages": prompt.chat,
        "max_completion_tokens": prompt.limit,
        "n": 1,
        "temperature": 0.0,
        "top_p": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "extra_body": {
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "min_tokens": 0,
            # vLLM's own end markers are those of the tokenizer and the generation config; these are transformers'.
            "ignore_eos": True,
            "stop_token_ids": prompt.ends,
            "return_token_ids": True,
            "vllm_xargs": {
                "visual_bias": strength.visual,
                "system_bias": strength.system,
                "attention_scores": "summary",
            },
        },
    }


def read(completion: Any) -> Reply:
    """What a chat completion says; `None` where it lacks vLLM's fields."""
    (choice,) = completion.choices
    extra = completion.model_extra
    attention = (extra.get("kv_transfer_params") or {}).get("visual_attention")
    return Reply(extra.get("prompt_token_ids"), choice.model_extra.get("token_ids"), choice.finish_reason, attention)


def _served(where: str, client: openai.OpenAI, model: str) -> str:
    """The server's name of the model. Raises RuntimeError where none of its models comes from such a place."""
    cards = [(card.id, card.model_extra.get("root") or card.id) for card in client.models.list().data]
    for name, root in cards:
        if Path(root).name == Path(model).name:
            if Path(root).is_dir() and Path(model).is_dir() and fingerprint(root) != fingerprint(model):
                raise RuntimeError(
                    f"{where} serves {root}, whose files are not those of {model}; if they are the same model, say so "
                    f"by --served-model {name}"
                )
            return name
    listed = ", ".join(name if name == root else f"{name} (from {root})" for name, root in cards)
    raise RuntimeError(
        f"{where} serves {listed or 'no model'}, not {model}; if that is the same model, say so by --served-model NAME"
    )


def _refusal(where: str, error: openai.APIStatusError) -> Exception:
    """A status as the error that it is: ValueError for this request, RuntimeError for all of them."""
    said = error.body.get("message") if isinstance(error.body, dict) else None
    text = f"{where} answers {error.status_code}: {said or error.message}"
    if error.status_code in REFUSED:
        return ValueError(text)
    return RuntimeError(text) if error.status_code in USELESS else Unanswered(text)


def _cause(error: Exception) -> str:
    return str(error.__cause__ or error) or type(error).__name__


def _settings(url: str, timeout: float) -> dict[str, Any]:
    """Of a client. It tries nothing again: a request that timed out would only add to the load."""
    key = os.environ.get("OPENAI_API_KEY", "none")
    return {"base_url": url, "api_key": key, "timeout": openai.Timeout(timeout, connect=CONNECT_S), "max_retries": 0}
