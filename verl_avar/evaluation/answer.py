"""Answers of a checkpoint, its own or given ones, and the attention masses of the whole conversation."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from verl_avar.attention.hf import Record, probe, role_bias
from verl_avar.evaluation.checkpoint import Checkpoint, check_context, prompt_inputs, prompt_roles
from verl_avar.roles import Role, query_mask


@dataclass(frozen=True)
class Answers:
    """A batch of prompts with their responses."""

    inputs: dict  # what the model's forward takes: input_ids [B, P+N], attention_mask, pixel_values, …
    roles: torch.Tensor  # uint8 [B, P+N]
    prompt_length: int  # P, left padding included
    texts: list[str]  # decoded responses, without the end marker


@torch.no_grad()
def answer(
    checkpoint: Checkpoint,
    prompts: Sequence,
    images: Sequence,
    max_new_tokens: int,
    intervention: dict | None = None,
) -> Answers:
    """Greedy responses to a batch of rows (see `prompt_inputs` for their form), each within the model's context.

    intervention: keyword arguments of `role_bias` (visual, system, layers, queries, mode) to generate under.
    """
    prompt = prompt_inputs(checkpoint, prompts, images)
    roles = prompt_roles(checkpoint, prompts, prompt)
    model = checkpoint.model
    limit = torch.full_like(prompt["attention_mask"][:, 0], max_new_tokens)  # [B]
    if checkpoint.context is not None:
        limit = limit.minimum(checkpoint.context - prompt["attention_mask"].sum(-1))
        if (limit < 1).any():
            raise ValueError(f"the prompt fills the model's context of {checkpoint.context} tokens")
    with _intervened(model, roles, intervention):
        # Greedy means greedy: some checkpoints ship a repetition penalty.
        sequences = model.generate(
            **prompt,
            max_new_tokens=int(limit.max()),
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=end_tokens(checkpoint),
        )
    written = sequences[:, prompt["input_ids"].shape[1] :]
    # Up to and including the first end marker; generate pads after it.
    stops = torch.isin(written, torch.tensor(end_tokens(checkpoint), device=written.device))
    ended = stops.long().cumsum(-1)
    response = (ended == 0) | ((ended == 1) & stops)
    response &= torch.arange(written.shape[1], device=written.device) < limit[:, None]  # not that of a shorter prompt
    return _answers(checkpoint, prompt, roles, written, response, stops)


@torch.no_grad()
def given(
    checkpoint: Checkpoint,
    prompts: Sequence,
    images: Sequence,
    responses: Sequence[str],
    ended: Sequence[bool] | None = None,
) -> Answers:
    """The batch of rows with responses that are already known, ended as the model would end them.

    ended: which of them the model ended; one that a limit cut off gets no end marker. All by default.

    Special tokens in a response count as such; one that ends with an end marker gets no second one. An empty response
    leaves its row without response tokens. Raises ValueError for a response that holds an image placeholder.
    """
    prompt = prompt_inputs(checkpoint, prompts, images)
    ended = [True] * len(responses) if ended is None else ended
    ids = [_written(checkpoint, text, end) for text, end in zip(responses, ended, strict=True)]
    width = max(map(len, ids), default=0)
    pad = checkpoint.tokenizer.pad_token_id or 0
    device = prompt["input_ids"].device
    padded = [row + [pad] * (width - len(row)) for row in ids]
    written = torch.tensor(padded, dtype=torch.long, device=device).view(len(ids), width)
    lengths = torch.tensor([len(row) for row in ids], device=device)
    response = torch.arange(width, device=device) < lengths[:, None]
    last = torch.arange(width, device=device) == lengths[:, None] - 1
    last &= torch.isin(written, torch.tensor(end_tokens(checkpoint), device=device))  # `texts` leaves it out
    roles = prompt_roles(checkpoint, prompts, prompt)
    answers = _answers(checkpoint, prompt, roles, written, response, last)
    check_context(checkpoint, answers.inputs["attention_mask"])
    return answers


def _written(checkpoint: Checkpoint, text: str, ended: bool) -> list[int]:
    """The ids of a response, with its end marker where it ended; none for an empty one."""
    ids, ends = checkpoint.tokenizer.encode(text, add_special_tokens=False), end_tokens(checkpoint)
    return ids if not ids or not ended or ids[-1] in ends else ids + ends[:1]


def _answers(checkpoint: Checkpoint, prompt: dict, roles, written, response, stops) -> Answers:
    """Prompt and response in one batch. written: ids [B, N]; response, stops: bool [B, N]."""
    if images := checkpoint.template.visual.intersection(written[response].tolist()):
        token = checkpoint.tokenizer.convert_ids_to_tokens(min(images))
        raise ValueError(f"the response holds {token}, the model's placeholder for an image")
    inputs = dict(prompt)
    inputs["input_ids"] = torch.cat([prompt["input_ids"], written], dim=1)
    inputs["attention_mask"] = torch.cat([prompt["attention_mask"], response.long()], dim=1)
    for name, value in prompt.items():
        if name in ("input_ids", "attention_mask") or value.shape[:2] != prompt["input_ids"].shape:
            continue
        if name == "cross_attention_mask":  # a response sees the images that the last token of its prompt sees
            more = value[:, -1:].expand(-1, written.shape[1], *value.shape[2:])
        elif name.endswith("token_type_ids"):  # a response holds no image tokens
            more = value.new_zeros(written.shape)
        else:
            raise ValueError(
                f"{type(checkpoint.processor).__name__}: '{name}' has one value per token, of unknown sense"
            )
        inputs[name] = torch.cat([value, more], dim=1)
    decode = checkpoint.tokenizer.decode
    texts = [decode(ids[keep & ~stop].tolist()) for ids, keep, stop in zip(written, response, stops, strict=True)]
    written_roles = torch.where(response, int(Role.RESPONSE), int(Role.OTHER)).to(roles.dtype)
    return Answers(inputs, torch.cat([roles, written_roles], dim=1), roles.shape[1], texts)


def end_tokens(checkpoint: Checkpoint) -> list[int]:
    """Ids that end a response: the template's end marker first, then what `generate` stops at (Qwen lists two)."""
    stops = checkpoint.model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    known = [*checkpoint.template.end_of_turn, *(i for i in stops if i is not None)]
    return list(dict.fromkeys(known or [checkpoint.tokenizer.eos_token_id]))


@torch.no_grad()
def answer_masses(
    checkpoint: Checkpoint, answers: Answers, scope: str = "user+response", intervention: dict | None = None
) -> Record:
    """Masses of the whole sequences in one forward pass, for the queries of a scope; under an intervention, if any."""
    with (
        _intervened(checkpoint.model, answers.roles, intervention),
        probe(answers.roles, queries=query_mask(answers.roles, scope)) as record,
    ):
        checkpoint.model(**answers.inputs, **attention_only(checkpoint.model))
    return record


def attention_only(model: torch.nn.Module) -> dict:
    """Keyword arguments of a full forward pass of which nobody reads logits or cache: both are large."""
    takes = inspect.signature(model.forward).parameters
    return {"use_cache": False} | ({"logits_to_keep": 1} if "logits_to_keep" in takes else {})


def _intervened(model, roles: torch.Tensor, intervention: dict | None):
    return role_bias(model, roles=roles, **intervention) if intervention else nullcontext()
