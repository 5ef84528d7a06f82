"""One request on vLLM: its token roles and options, read the same way in the front end and in the scheduler."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from verl_avar.roles import ChatTokens, Role, token_roles
from verl_avar.rollout import CONNECTOR, requested
from verl_avar.rollout.options import LAYERS_KEY, OPTION_KEYS, RequestOptions
from verl_avar.rollout.probed_layers import check_layers

VISUAL_MODALITIES = ("image", "video")
STOP_STRING = "vLLM finds stop strings outside of the engine, which then drops the score"


def chat_tokens(model_config: Any) -> ChatTokens:
    """Chat markers and placeholder ids of an engine's model (`VllmConfig.model_config`).

    Raises ValueError where the tokenizer is not ChatML or the model has no visual placeholder.
    """
    config = model_config.hf_config
    placeholders = [getattr(config, key, None) for key in ("image_token_id", "video_token_id")]
    if placeholders == [None, None]:
        raise ValueError(
            f"roles: {type(config).__name__} of {model_config.model} has neither image_token_id nor video_token_id: "
            "this model has no image or video to attend to"
        )
    return _chat_tokens(
        model_config.tokenizer, model_config.tokenizer_revision, model_config.trust_remote_code, *placeholders
    )


@lru_cache(maxsize=8)
def _chat_tokens(
    path: str, revision: str | None, trust_remote_code: bool, image: int | None, video: int | None
) -> ChatTokens:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    return ChatTokens.from_tokenizer(tokenizer, SimpleNamespace(image_token_id=image, video_token_id=video))


def prompt_roles(prompt_token_ids: list[int] | None, mm_features: list[Any] | None, chat: ChatTokens) -> np.ndarray:
    """Roles of a prompt's tokens: uint8 [P].

    VISUAL is exactly where vLLM puts image or video embeddings (`mm_features`, a list of `MultiModalFeatureSpec`).
    Raises ValueError where the roles can't be determined, and where a placeholder id carries no embedding.
    """
    import torch

    if prompt_token_ids is None:
        raise ValueError("roles: a prompt given as embeddings has no token ids")
    ids = torch.tensor([prompt_token_ids])
    roles = token_roles(ids, chat)[0].numpy()
    embedded = np.zeros(len(roles), dtype=bool)
    for feature in mm_features or ():
        if feature.modality in VISUAL_MODALITIES:
            for first, last in feature.mm_position.extract_embeds_range():
                embedded[first : last + 1] = True
    if (stray := np.flatnonzero((roles == Role.VISUAL) & ~embedded)).size:
        where = chat.around(prompt_token_ids, int(stray[0]))
        raise ValueError(f"roles: a visual placeholder that carries no embedding: {where}")
    roles[embedded] = Role.VISUAL
    return roles


def roles_salt(prompt_token_ids: list[int], roles: np.ndarray, chat: ChatTokens) -> str:
    """Keeps the prefix cache of a prompt apart whose roles [P] its prefixes don't tell: requests that share a block
    share the roles in it, while vLLM compares no more than the tokens up to its end.

    Empty for a prompt that begins with a turn and goes on to another one, no other than the first being the system's:
    there equal tokens have equal roles. Else a later turn may make earlier tokens the system's, or the response of one
    prompt continue a system turn that another prompt has as a whole.
    """
    starts = np.flatnonzero(np.asarray(prompt_token_ids) == chat.turn_start)
    system = starts[roles[starts] == Role.SYSTEM].tolist()
    if starts[0] == 0 and len(starts) > len(system) and system in ([], [0]):
        return ""
    return f"avar:roles:{hashlib.sha256(roles.tobytes()).hexdigest()}"


def check_engine(vllm_config: Any) -> None:
    """Raises ValueError where an engine's connector config or tokenizer would fail it, before it loads the model."""
    if requested(vllm_config):
        extra_config = vllm_config.kv_transfer_config.kv_connector_extra_config
        try:
            RequestOptions.from_config(extra_config)
            check_layers(extra_config.get(LAYERS_KEY))
        except ValueError as error:
            raise ValueError(f"kv_connector_extra_config of {CONNECTOR}: {error}") from None
        chat_tokens(vllm_config.model_config)


def request_options(vllm_config: Any, extra_args: Mapping[str, Any] | None, stop: Any) -> RequestOptions | None:
    """The options of a request with these `extra_args` and stop strings; None on an engine without the connector.

    Raises ValueError for a bad option, one that would be ignored because this engine runs without the connector, and a
    question for scores where there will be none.
    """
    extra = extra_args or {}
    if not requested(vllm_config):
        if unheard := [key for key in OPTION_KEYS if key in extra]:
            raise ValueError(
                f"{', '.join(unheard)}: this engine runs without the visual-attention connector; start it with "
                "avar serve, or with kv_transfer_config=verl_avar.rollout.kv_transfer_config()"
            )
        return None
    if "attention_scores" in extra and stop:
        raise ValueError(
            f"attention_scores with stop strings: {STOP_STRING}; give stop_token_ids, or leave attention_scores out"
        )
    defaults = RequestOptions.from_config(vllm_config.kv_transfer_config.kv_connector_extra_config)
    return RequestOptions.from_mapping(extra, defaults)


def refuse_bad_request(vllm_config: Any, request: Any) -> None:
    """Raises ValueError for a request (`EngineCoreRequest`) whose options are bad (`request_options`) or can't be
    honoured because its roles can't be determined.

    Writes the options that hold for it, the engine's defaults included, into its `extra_args`.
    """
    params = request.sampling_params
    if params is None or (options := request_options(vllm_config, params.extra_args, params.stop)) is None:
        return
    if getattr(request, "resumable", False):
        raise ValueError("prompts that arrive in parts (streaming input) can't be scored; send the prompt as a whole")
    if options.biased:
        prompt_roles(request.prompt_token_ids, request.mm_features, chat_tokens(vllm_config.model_config))
    params.extra_args = {**(params.extra_args or {}), **options.as_dict()}


def has_options(request: Any) -> bool:
    """Whether an `EngineCoreRequest` went through `refuse_bad_request` on an engine with the connector."""
    params = request.sampling_params
    return params is not None and set(OPTION_KEYS) <= (params.extra_args or {}).keys()


def unscored(n: int, reason: str) -> dict[str, Any]:
    """The `visual_attention` of a response of n tokens that has no score."""
    from verl_avar.reward import SCORES

    return {**dict.fromkeys(SCORES), "n": n, "reason": reason}
