"""The prompts of a sweep on vLLM: those of the transformers path, made without the model's weights.

vLLM makes its prompts itself, from the same conversation and pictures; `sweep_vllm` refuses answers to any other ids.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, GenerationConfig

from verl_avar.evaluation.answer import end_tokens
from verl_avar.evaluation.checkpoint import Checkpoint, conversation, prompt_inputs, prompt_roles
from verl_avar.evaluation.images import open_images
from verl_avar.evaluation.sweep import Task
from verl_avar.roles import ChatTokens, Role, token_roles
from verl_avar.template import ChatTemplate

INSTEAD = "use --backend transformers"


@dataclass(frozen=True)
class Weightless:
    """Stands for the model of a `Checkpoint` where prompts are made and nothing is computed."""

    config: Any
    generation_config: GenerationConfig
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


def load_prompter(path: str | Path) -> Checkpoint:
    """A checkpoint's processor, chat template and configs; its `model` is `Weightless`.

    Raises OSError or ValueError where the folder lacks them, as `load_checkpoint` does. Code that comes with a
    checkpoint is never run.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
    if not hasattr(processor, "tokenizer"):
        raise ValueError(f"{path}: no multimodal processor; the folder needs its tokenizer and image processor files")
    try:
        generation = GenerationConfig.from_pretrained(path)
    except OSError:  # as a model of transformers without such a file has it
        generation = GenerationConfig.from_model_config(config)
    return Checkpoint(Weightless(config, generation), processor, ChatTemplate.of(processor, config))


def check_model(checkpoint: Checkpoint) -> None:
    """Raises ValueError, by name, for a model whose attention or chat template the connector does not serve."""
    config = checkpoint.model.config
    if reason := next(_unserved(config.get_text_config()), None):
        raise ValueError(f"{type(config).__name__}: {reason}, which the visual-attention connector refuses; {INSTEAD}")
    template, question = checkpoint.template, [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
    ids = checkpoint.tokenizer.encode(template.render(question), add_special_tokens=False)
    try:
        same = _same_roles(checkpoint, ids, template.roles(question, ids))
    except ValueError as error:
        raise ValueError(f"{type(config).__name__}: no roles on vLLM ({error}); {INSTEAD}") from None
    if not same:
        raise ValueError(f"{type(config).__name__}: vLLM would take another part of the prompt as system; {INSTEAD}")


def _unserved(text: Any) -> Iterator[str]:
    """What is special about the attention of a text model's config."""
    kinds = getattr(text, "layer_types", None)
    yield from (f"layers of {kind}" for kind in sorted(set(kinds or ()) - {"full_attention"}))
    if kinds is None and getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True):
        yield "a sliding window"
    if getattr(text, "cross_attention_layers", None):
        yield "layers of cross-attention"
    if getattr(text, "attn_logit_softcapping", None):
        yield "soft-capped attention logits"


def _same_roles(checkpoint: Checkpoint, ids: list[int], roles: np.ndarray) -> bool:
    """Whether the connector, which goes by ids, reads the same system turn and image in a prompt as the template.

    Raises ValueError where it can't read them.
    """
    chat = ChatTokens.from_tokenizer(checkpoint.processor, checkpoint.model.config)
    by_ids = token_roles(torch.tensor([ids]), chat)[0].numpy()
    return all(((by_ids == role) == (roles == role)).all() for role in (Role.SYSTEM, Role.VISUAL))


@dataclass
class Prompt:
    """One row as vLLM is asked it."""

    text: str  # rendered, one placeholder per image
    messages: list[dict]  # content as parts
    images: list[Image.Image]
    ids: list[int]  # what vLLM has to make of it, placeholders expanded
    limit: int  # of new tokens, within the model's context
    add_special_tokens: bool  # whether the tokenizer writes its begin token, or the template has
    ends: list[int]  # ids that end an answer

    @cached_property
    def chat(self) -> list[dict]:
        """The conversation in the OpenAI API's form, its images as PNG: the very pixels of `images`."""
        images = iter(self.images)

        def part(each: dict) -> dict:
            return (
                {"type": "image_url", "image_url": {"url": _data_url(next(images))}}
                if each["type"] == "image"
                else each
            )

        return [{"role": m["role"], "content": [part(each) for each in m["content"]]} for m in self.messages]


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="png", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


class Prompts:
    """Makes the prompts of a checkpoint's rows."""

    def __init__(self, checkpoint: Checkpoint, max_new_tokens: int):
        self.checkpoint, self.max_new_tokens = checkpoint, max_new_tokens
        self._last: tuple[int | None, Prompt | None] = None, None

    def of(self, task: Task) -> Prompt:
        """A task's prompt; tasks of one row that follow each other share it.

        Raises ValueError or OSError as the transformers path does, and where vLLM would read other roles.
        """
        if self._last[0] != task.number:
            self._last = task.number, self.make(task.row.messages, task.row.images)
        return self._last[1]

    def make(self, messages: list[dict], images: list) -> Prompt:
        """The prompt of a conversation."""
        checkpoint, messages, images = self.checkpoint, conversation(messages), open_images(images)
        inputs = prompt_inputs(checkpoint, [messages], [images])
        ids, roles = inputs["input_ids"][0].tolist(), prompt_roles(checkpoint, [messages], inputs)[0].numpy()
        if not _same_roles(checkpoint, ids, roles):
            raise ValueError(f"vLLM would read another system turn or image in this prompt; {INSTEAD}")
        limit = self.max_new_tokens
        if checkpoint.context is not None:
            limit = min(limit, checkpoint.context - len(ids))
        if limit < 1:
            raise ValueError(f"the prompt fills the model's context of {checkpoint.context} tokens")
        text, bos = checkpoint.template.render(messages), checkpoint.tokenizer.bos_token
        written = bos is not None and text.startswith(bos)
        return Prompt(text, messages, images, ids, limit, not written, end_tokens(checkpoint))
