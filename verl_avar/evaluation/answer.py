"""Greedy answers of a checkpoint and the attention masses of its own responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from verl_avar.attention.hf import Record, probe
from verl_avar.evaluation.checkpoint import Checkpoint, prompt_inputs
from verl_avar.roles import query_mask, token_roles


@dataclass(frozen=True)
class Answers:
    """A batch of prompts with the responses generated for them."""

    inputs: dict  # what the model's forward takes: input_ids [B, P+N], attention_mask, pixel_values, …
    roles: torch.Tensor  # uint8 [B, P+N]
    prompt_length: int  # P, left padding included
    texts: list[str]  # decoded responses, without the end marker


@torch.no_grad()
def answer(checkpoint: Checkpoint, prompts: Sequence, images: Sequence, max_new_tokens: int) -> Answers:
    """Greedy responses to a batch of rows (see `prompt_inputs` for their form)."""
    prompt = prompt_inputs(checkpoint, prompts, images)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    # Greedy means greedy: some checkpoints ship a repetition penalty.
    sequences = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False, repetition_penalty=1.0)
    prompt_length = prompt["input_ids"].shape[1]
    written = sequences[:, prompt_length:]
    # Up to and including the first end marker; generate pads after it.
    stops = torch.isin(written, torch.tensor(end_tokens(checkpoint), device=written.device))
    ended = stops.long().cumsum(-1)
    response = (ended == 0) | ((ended == 1) & stops)
    zeros = torch.zeros_like(prompt["input_ids"])
    response_mask = torch.cat([zeros, response.long()], dim=1)
    attention_mask = torch.cat([prompt["attention_mask"], response.long()], dim=1)
    inputs = dict(prompt) | {"input_ids": sequences, "attention_mask": attention_mask}
    if "mm_token_type_ids" in inputs:  # M-RoPE of transformers 5.10 counts image tokens by it; responses hold none
        inputs["mm_token_type_ids"] = torch.cat([prompt["mm_token_type_ids"], torch.zeros_like(written)], dim=1)
    texts = [
        tokenizer.decode(ids[keep & ~stop].tolist()) for ids, keep, stop in zip(written, response, stops, strict=True)
    ]
    roles = token_roles(sequences, checkpoint.chat, attention_mask, response_mask)
    return Answers(inputs, roles, prompt_length, texts)


def end_tokens(checkpoint: Checkpoint) -> list[int]:
    """Ids that end a response: the template's end marker, and what `generate` stops at (Qwen lists two)."""
    stops = checkpoint.model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    return [checkpoint.chat.turn_end, *(i for i in stops if i is not None)]


@torch.no_grad()
def answer_masses(checkpoint: Checkpoint, answers: Answers, scope: str = "user+response") -> Record:
    """Masses of the whole sequences in one forward pass, for the queries of a scope."""
    with probe(answers.roles, queries=query_mask(answers.roles, scope)) as record:
        checkpoint.model(**answers.inputs)
    return record
