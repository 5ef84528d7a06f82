"""Token roles: who is who in a batch (AVAR §2, arXiv:2603.03825).

Roles come from the token ids of the chat template and of the model's visual placeholders. Decoded text is only ever
used to word an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import torch


class Role(IntEnum):
    """Role of one token. The values fit one byte, so that a batch of roles is a uint8 tensor."""

    OTHER = 0  # padding, assistant headers, and markers that belong to no role
    SYSTEM = 1  # the system turn, from the first token up to the first user turn
    VISUAL = 2  # placeholder positions that carry image or video embeddings, without their begin/end markers
    USER = 3  # the rest of the user turns
    RESPONSE = 4  # assistant tokens that the model wrote or is trained on, the closing <|im_end|> included


SCOPES = ("user", "response", "user+response")
_TURN_ROLES = {"system": Role.SYSTEM, "user": Role.USER, "assistant": Role.RESPONSE, "tool": Role.USER}


@dataclass(frozen=True)
class ChatTokens:
    """The ids that delimit a ChatML conversation: `turn_start` name newline … `turn_end`."""

    turn_start: int
    turn_end: int
    headers: dict[str, tuple[int, ...]]  # token ids of each turn's name; "tool" turns count as the user's
    newline: int
    visual: frozenset[int]
    pad: int | None = None
    tokenizer: Any = field(default=None, compare=False, repr=False)  # words errors, nothing else

    @classmethod
    def from_tokenizer(cls, tokenizer, config=None) -> ChatTokens:
        """Reads the ids off a tokenizer (or processor) and a model config with `image_token_id`/`video_token_id`.

        Raises ValueError where the tokenizer has no ChatML markers or the config no placeholder id.
        """
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>")}
        for name, i in ids.items():
            if i is None or i == tokenizer.unk_token_id:
                raise ValueError(f"roles: the tokenizer has no {name} token; only ChatML templates are supported")
        visual = {getattr(config, key, None) for key in ("image_token_id", "video_token_id")} - {None}
        if config is not None and not visual:
            raise ValueError(f"roles: {type(config).__name__} has neither image_token_id nor video_token_id")
        newline = tokenizer.encode("\n", add_special_tokens=False)
        if len(newline) != 1:
            raise ValueError("roles: the tokenizer does not write a newline as one token")
        headers = {name: tuple(tokenizer.encode(name, add_special_tokens=False)) for name in _TURN_ROLES}
        return cls(
            turn_start=ids["<|im_start|>"],
            turn_end=ids["<|im_end|>"],
            headers=headers,
            newline=newline[0],
            visual=frozenset(visual),
            pad=tokenizer.pad_token_id,
            tokenizer=tokenizer,
        )

    def around(self, ids: Sequence[int], position: int, width: int = 8) -> str:
        """The neighbourhood of a position, decoded where a tokenizer is at hand, for error messages."""
        near = [int(i) for i in ids[max(0, position - width) : position + width]]
        return repr(self.tokenizer.decode(near)) if self.tokenizer is not None else str(near)


def token_roles(
    input_ids: torch.Tensor,
    chat: ChatTokens,
    attention_mask: torch.Tensor | None = None,
    response_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Roles of a padded batch.

    input_ids: [B, T]. attention_mask: [B, T], 0 at padding, on either side; required where there is padding.
    response_mask: [B, T], 1 at the assistant tokens that count as RESPONSE (a loss or response mask); without it all
    of an assistant turn up to and including its end marker counts.
    Returns uint8 [B, T] of `Role` values on the device of `input_ids`.
    Raises ValueError, with the neighbourhood decoded, where a role can't be determined from the ids.
    """
    ids = input_ids.detach().cpu().numpy()
    valid = None if attention_mask is None else attention_mask.detach().cpu().numpy().astype(bool)
    written = None if response_mask is None else response_mask.detach().cpu().numpy().astype(bool)
    roles = np.zeros(ids.shape, dtype=np.uint8)
    for b in range(ids.shape[0]):
        keep = np.ones(ids.shape[1], dtype=bool) if valid is None else valid[b]
        if written is not None and (written[b] & ~keep).any():
            raise ValueError(f"roles: row {b}: the response mask marks padding")
        try:
            roles[b, keep] = _sequence_roles(ids[b, keep], chat, None if written is None else written[b, keep])
        except ValueError as error:
            raise ValueError(f"roles: row {b}: {error}") from None
    return torch.from_numpy(roles).to(input_ids.device)


def _sequence_roles(ids: np.ndarray, chat: ChatTokens, written: np.ndarray | None) -> np.ndarray:
    """Roles of one unpadded sequence: ids [T], written (the response mask) bool [T] or None."""
    roles = np.full(len(ids), Role.OTHER, dtype=np.uint8)
    # What the model wrote can't open a turn, whatever ids it sampled.
    opens = ids == chat.turn_start
    if written is not None:
        opens &= ~written
    starts = np.flatnonzero(opens)
    if len(starts) == 0:
        raise ValueError(f"no turn starts in this sequence: {chat.around(ids, 0)}")
    if chat.pad is not None and (ids[: starts[0]] == chat.pad).any():
        raise ValueError(f"padding without an attention mask: {chat.around(ids, int(starts[0]))}")
    visual = np.isin(ids, list(chat.visual))
    seen_user = False
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        name, body = _turn_header(ids, int(start), chat)
        role = _TURN_ROLES[name]
        if role is Role.SYSTEM:
            if seen_user:
                raise ValueError(f"a system turn after a user turn: {chat.around(ids, int(start))}")
            # "From the first token": a begin-of-sequence token before the turn belongs to it.
            roles[0 if start == starts[0] else start : stop] = role
        elif role is Role.USER:
            seen_user = True
            roles[start:stop] = role
        else:
            turn = np.zeros(len(ids), dtype=bool)
            turn[body:stop] = True
            if written is None:
                if visual[body:stop].any():
                    where = body + int(np.argmax(visual[body:stop]))
                    raise ValueError(f"a visual placeholder in an assistant turn: {chat.around(ids, where)}")
                ends = np.flatnonzero(ids[body:stop] == chat.turn_end)
                turn[body + (int(ends[0]) + 1 if len(ends) else stop - body) : stop] = False
                roles[turn] = role
            else:
                roles[turn & written] = role
    if written is not None and (stray := np.flatnonzero(written & (roles != Role.RESPONSE))).size:
        raise ValueError(f"the response mask marks a token outside assistant turns: {chat.around(ids, int(stray[0]))}")
    roles[visual & (roles != Role.RESPONSE)] = Role.VISUAL
    return roles


def _turn_header(ids: np.ndarray, start: int, chat: ChatTokens) -> tuple[str, int]:
    """Name of the turn that opens at `start`, and the position of its first token after the header."""
    for name, header in chat.headers.items():
        stop = start + 1 + len(header)
        if tuple(ids[start + 1 : stop]) == header:
            return name, stop + int(stop < len(ids) and ids[stop] == chat.newline)
    raise ValueError(f"a turn of unknown role (known: {', '.join(chat.headers)}): {chat.around(ids, start)}")


def query_mask(roles: torch.Tensor, scope: str) -> torch.Tensor:
    """The queries U of a scope (AVAR §2.2, §3.3). roles: uint8 [B, T]. Returns bool [B, T].

    `user`: the user's tokens after the first image of the sequence. `response`: the queries that produce the response
    tokens, one position before each, so that they align one to one with log-probs (positions P-1 … P+n-2 for a prompt
    of P tokens and a response of n). `user+response`: both.
    """
    if scope not in SCOPES:
        raise ValueError(f"roles: unknown query scope '{scope}'; use one of {', '.join(SCOPES)}")
    queries = torch.zeros_like(roles, dtype=torch.bool)
    if "user" in scope:
        after_image = (roles == Role.VISUAL).cumsum(dim=-1) > 0
        queries |= after_image & (roles == Role.USER)
    if "response" in scope:
        queries[:, :-1] |= roles[:, 1:] == Role.RESPONSE
    return queries
