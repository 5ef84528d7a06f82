"""Loading a checkpoint for evaluation, and turning conversations into model inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from verl_avar.attention.hf import attention_config
from verl_avar.evaluation.images import open_images
from verl_avar.template import ChatTemplate

IMAGE_PLACEHOLDER = "<image>"  # verl's, in the text of its rows


@dataclass(frozen=True)
class Checkpoint:
    """A loaded vision-language model with its processor and its chat template."""

    model: torch.nn.Module
    processor: Any
    template: ChatTemplate

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    @property
    def context(self) -> int | None:
        """Positions that the model was made for, where its config says so."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)


def load_checkpoint(
    path: str | Path, implementation: str = "avar_sdpa", dtype: Any = torch.float32, device: str = "cpu"
) -> Checkpoint:
    """Loads a Hugging Face checkpoint with an attention implementation that reports masses.

    dtype: a torch dtype, or "auto" for the checkpoint's own.
    Raises OSError where the folder holds no whole checkpoint, ValueError where transformers knows no vision-language
    model of its kind or where its template has no determinable roles. Code that comes with a checkpoint is never run.
    """
    if Path(path).is_file():
        raise NotADirectoryError(f"{path}: a file; a checkpoint is the folder that holds config.json and the weights")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{path}: a model that brings its own code, which is not run here; transformers "
                f"{transformers.__version__} knows no such architecture"
            ) from None
        if Path(path).exists():
            raise
        raise FileNotFoundError(f"{path}: no such folder, and no checkpoint of that name can be had") from error
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise ValueError(
            f"{path}: transformers has no vision-language model for {type(config).__name__}; a text-only model has no "
            "visual attention to measure"
        )
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
    if not hasattr(processor, "tokenizer"):
        raise ValueError(f"{path}: no multimodal processor; the folder needs its tokenizer and image processor files")
    template = ChatTemplate.of(processor, config)
    try:
        model, loaded = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention_config(config, implementation),
            trust_remote_code=False,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise OSError(f"{path}: weights can't be read, perhaps cut off: {error}") from error
    except ValueError as error:
        if "attention implementation" not in str(error):
            raise
        kind = AutoModelForImageTextToText._model_mapping[type(config)].__name__
        raise ValueError(f"{path}: the attention of {kind} can't be exchanged, so it can't be probed") from error
    if missing := sorted(loaded["missing_keys"]):  # transformers would go on with random ones
        raise ValueError(f"{path}: {len(missing)} of the model's weights are not in its files; the first: {missing[0]}")
    processor.tokenizer.padding_side = "left"
    return Checkpoint(model.to(device).eval(), processor, template)


def conversation(messages: Sequence[dict]) -> list[dict]:
    """Messages with their content as parts: `<image>` in a text becomes an image part; parts stay as they are."""

    def parts(content) -> list[dict]:
        if not isinstance(content, str):
            return [dict(part) for part in content]
        pieces = content.split(IMAGE_PLACEHOLDER)
        found = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
        for piece in pieces[1:]:
            found += [{"type": "image"}] + ([{"type": "text", "text": piece}] if piece else [])
        return found

    return [{"role": m["role"], "content": parts(m["content"])} for m in messages]


def prompt_inputs(checkpoint: Checkpoint, prompts: Sequence[Sequence[dict]], images: Sequence[Sequence]) -> dict:
    """Left-padded generation inputs of a batch, on the model's device.

    prompts: chat messages of each row, `<image>` in the text where an image goes, or content parts; images: of each
    row, in order. Raises ValueError where their numbers differ, and for a prompt beyond the model's context.
    """
    messages = [conversation(prompt) for prompt in prompts]
    for row, (prompt, pictures) in enumerate(zip(messages, images, strict=True)):
        wanted = sum(part["type"] == "image" for message in prompt for part in message["content"])
        if wanted != len(pictures):
            raise ValueError(f"row {row}: {wanted} {IMAGE_PLACEHOLDER} in the prompt, {len(pictures)} images")
        _check_texts(checkpoint, prompt)
    texts = [checkpoint.template.render(m) for m in messages]
    pictures = [open_images(row) for row in images]
    if not all(pictures):  # some processors take nested lists only where every row has an image
        pictures = [image for row in pictures for image in row] or None
    bos = checkpoint.tokenizer.bos_token
    written = bos is not None and texts[0].startswith(bos)  # by the template; a second one would change the answer
    inputs = checkpoint.processor(
        text=texts, images=pictures, padding=True, add_special_tokens=not written, return_tensors="pt"
    )
    check_context(checkpoint, inputs["attention_mask"])
    model = checkpoint.model
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }


def _check_texts(checkpoint: Checkpoint, prompt: Sequence[dict]) -> None:
    """Raises ValueError where a text holds the model's own placeholder: processors fail on it in obscure ways."""
    for token in checkpoint.tokenizer.convert_ids_to_tokens(sorted(checkpoint.template.visual)):
        if token and any(token in part.get("text", "") for message in prompt for part in message["content"]):
            raise ValueError(f"a text of the prompt holds {token}, the model's placeholder for an image")


def check_context(checkpoint: Checkpoint, attention_mask: torch.Tensor) -> None:
    """Raises ValueError where a row of the mask [B, T] is longer than what the model was made for."""
    longest, limit = int(attention_mask.sum(-1).max()), checkpoint.context
    if limit is not None and longest > limit:
        raise ValueError(f"{longest} tokens are more than the model's context of {limit}")


def prompt_roles(checkpoint: Checkpoint, prompts: Sequence[Sequence[dict]], inputs: dict) -> torch.Tensor:
    """Roles of the prompts in `inputs` (from `prompt_inputs`): uint8 [B, P]; padding is OTHER."""
    ids, mask = inputs["input_ids"].cpu(), inputs["attention_mask"].cpu().bool()
    roles = torch.zeros(ids.shape, dtype=torch.uint8)
    for b, prompt in enumerate(prompts):
        roles[b, mask[b]] = torch.from_numpy(checkpoint.template.roles(conversation(prompt), ids[b, mask[b]].tolist()))
    return roles.to(inputs["input_ids"].device)
