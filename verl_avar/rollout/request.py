"""One request on vLLM: its token roles and options, read the same way in the front end and in the scheduler."""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from verl_avar.roles import ChatTokens, Role, token_roles
from verl_avar.rollout import requested
from verl_avar.rollout.engine_options import request_defaults
from verl_avar.rollout.options import OPTION_KEYS, RequestOptions

VISUAL_MODALITIES = ("image", "video")


def chat_tokens(model_config: Any) -> ChatTokens:
    """Chat markers and placeholder ids of an engine's model (`VllmConfig.model_config`).

    Raises ValueError where the tokenizer is not ChatML or the model has no visual placeholder.
    """
    config = model_config.hf_config
    placeholders = [getattr(config, key, None) for key in ("image_token_id", "video_token_id")]
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


def refuse_bad_request(vllm_config: Any, request: Any) -> None:
    """Raises ValueError for a request (`EngineCoreRequest`) whose options are bad, can't be honoured because its roles
    can't be determined, or would be ignored because this engine runs without the connector."""
    params = request.sampling_params
    if params is None:
        return
    extra = params.extra_args or {}
    if not requested(vllm_config):
        if unheard := [key for key in OPTION_KEYS if key in extra]:
            raise ValueError(
                f"{', '.join(unheard)}: this engine runs without the visual-attention connector; start it with "
                "kv_transfer_config=verl_avar.rollout.kv_transfer_config()"
            )
        return
    if getattr(request, "resumable", False):
        raise ValueError("prompts that arrive in parts (streaming input) can't be scored; send the prompt as a whole")
    defaults = request_defaults(vllm_config.kv_transfer_config.kv_connector_extra_config)
    if RequestOptions.from_mapping(extra, defaults).biased:
        prompt_roles(request.prompt_token_ids, request.mm_features, chat_tokens(vllm_config.model_config))
