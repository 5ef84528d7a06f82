"""Loading a checkpoint for evaluation, and turning rows into model inputs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from verl_avar.attention.hf import attention_config
from verl_avar.roles import ChatTokens

IMAGE_PLACEHOLDER = "<image>"  # verl's, in the text of its rows


@dataclass(frozen=True)
class Checkpoint:
    """A loaded vision-language model with its processor and the ids of its chat template."""

    model: torch.nn.Module
    processor: Any
    chat: ChatTokens

    @property
    def tokenizer(self):
        return self.processor.tokenizer


def load_checkpoint(path: str | Path, implementation: str = "avar_sdpa", dtype=torch.float32) -> Checkpoint:
    """Loads a Hugging Face checkpoint with an attention implementation that reports masses.

    Raises OSError where the folder holds no checkpoint, ValueError where its template has no determinable roles.
    """
    config = AutoConfig.from_pretrained(path)
    model = AutoModelForImageTextToText.from_pretrained(
        path, dtype=dtype, attn_implementation=attention_config(config, implementation)
    ).eval()
    processor = AutoProcessor.from_pretrained(path)
    processor.tokenizer.padding_side = "left"
    return Checkpoint(model, processor, ChatTokens.from_tokenizer(processor, config))


def open_images(images: Sequence[Any]) -> list[Image.Image]:
    """Images of a row: {"bytes": …} or {"path": …} as verl and datasets store them, or PIL images."""

    def one(image):
        if isinstance(image, Image.Image):
            return image.convert("RGB")
        source = io.BytesIO(image["bytes"]) if image.get("bytes") else image["path"]
        return Image.open(source).convert("RGB")

    return [one(image) for image in images]


def prompt_inputs(checkpoint: Checkpoint, prompts: Sequence[Sequence[dict]], images: Sequence[Sequence]) -> dict:
    """Left-padded generation inputs of a batch.

    prompts: chat messages of each row, `<image>` in the text where an image goes; images: of each row, in order.
    """

    def parts(text: str) -> list[dict]:
        pieces = text.split(IMAGE_PLACEHOLDER)
        content = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
        for piece in pieces[1:]:
            content += [{"type": "image"}] + ([{"type": "text", "text": piece}] if piece else [])
        return content

    messages = [[{"role": m["role"], "content": parts(m["content"])} for m in prompt] for prompt in prompts]
    for row, (prompt, pictures) in enumerate(zip(messages, images, strict=True)):
        wanted = sum(part["type"] == "image" for message in prompt for part in message["content"])
        if wanted != len(pictures):
            raise ValueError(f"row {row}: {wanted} {IMAGE_PLACEHOLDER} in the prompt, {len(pictures)} images")
    texts = [checkpoint.processor.apply_chat_template(m, add_generation_prompt=True, tokenize=False) for m in messages]
    pictures = [image for row in images for image in open_images(row)]
    return checkpoint.processor(text=texts, images=pictures or None, padding=True, return_tensors="pt")
