"""Which token is which in a forward pass of a model: the roles of its keys and the queries chosen, cache included."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn

from verl_avar.attention.layers import cross_attends
from verl_avar.roles import Role, query_mask

QUERIES = ("all", "text", "response")


@dataclass(frozen=True)
class Pass:
    """One forward pass of a model."""

    roles: torch.Tensor  # uint8 [B, past + T], of all tokens so far; those generated are RESPONSE
    length: int  # T, the tokens of this pass
    selected: torch.Tensor | None  # bool [B, T], the queries chosen; None for all
    first_key: dict[int, int]  # of layers with a sliding cache: the position of their first key

    def key_roles(self, layer: int, length: int, where: str) -> torch.Tensor:
        """Roles [B, length] of a layer's keys. A static cache holds room for later tokens, which are hidden."""
        first, total = self.first_key.get(layer, 0), self.roles.shape[1]
        if first + length < total:
            raise ValueError(f"{where} has {length} keys for {total} tokens; only layers that keep all of them, or a "
                             "sliding window in transformers' cache, can be biased")  # fmt: skip
        roles = self.roles[:, first : first + length]
        return nn.functional.pad(roles, (0, length - roles.shape[1]), value=int(Role.RESPONSE))


class Positions:
    """Follows the forward passes of one model. roles: uint8 [B, T] of the first tokens of each row, if known."""

    def __init__(self, model: nn.Module, queries: str, roles: torch.Tensor | None):
        self.queries, self.roles = queries, roles
        self.visual = None if roles is not None else _visual_ids(model)
        self._cached: WeakKeyDictionary = WeakKeyDictionary()  # cache -> roles [B, tokens] of what it holds

    def of_pass(self, args: tuple, kwargs: dict) -> Pass:
        """What the model is about to see. args, kwargs: those of its forward method."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        tokens = ids if ids is not None else kwargs.get("inputs_embeds")
        if tokens is None:
            raise ValueError("role_bias: the model was called with neither input_ids nor inputs_embeds")
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        batch, length = tokens.shape[:2]
        if self.roles is not None:
            roles = self._given(batch, past + length, tokens.device)
        else:
            roles = self._found(ids, cache, past)
        selected = self._selected(roles, past, length, kwargs)
        sliding = getattr(cache, "is_sliding", ())
        first_key = {i: cache.get_mask_sizes(length, i)[1] for i, slides in enumerate(sliding) if slides}
        seen = Pass(roles, length, selected, first_key)
        self.remember(seen, cache)
        return seen

    def remember(self, seen: Pass, cache) -> None:
        """Notes what a cache holds, so that the next pass on it knows its past."""
        if cache is not None and self.roles is None:
            self._cached[cache] = seen.roles

    def _given(self, batch: int, total: int, device) -> torch.Tensor:
        rows, known = self.roles.shape
        if batch % rows:
            raise ValueError(f"role_bias: roles of {rows} sequences, the model was called with {batch}")
        if total < known:
            raise ValueError(f"role_bias: roles of {known} tokens, the model was called with {total}")
        roles = self.roles.to(device).repeat_interleave(batch // rows, dim=0)
        return nn.functional.pad(roles, (0, total - known), value=int(Role.RESPONSE))

    def _found(self, ids: torch.Tensor | None, cache, past: int) -> torch.Tensor:
        if ids is None:
            raise ValueError("role_bias: inputs_embeds hold no ids to find visual tokens in; pass roles=")
        roles = torch.where(torch.isin(ids, self.visual.to(ids.device)), int(Role.VISUAL), int(Role.OTHER))
        roles = roles.to(torch.uint8)
        if past == 0:
            return roles
        before = self._cached.get(cache)
        if before is None or before.shape[1] < past or len(before) != len(ids):
            raise ValueError(
                "role_bias: the cache holds tokens that were computed before role_bias was opened; open it before the "
                "prompt is computed, or pass roles="
            )
        if ids.shape[1] == 1:  # what the model wrote is no image, whatever id it sampled
            roles = torch.full_like(roles, int(Role.RESPONSE))
        return torch.cat([before[:, :past], roles], dim=1)

    def _selected(self, roles: torch.Tensor, past: int, length: int, kwargs: dict) -> torch.Tensor | None:
        known = 0 if self.roles is None else self.roles.shape[1]
        generated = past > 0 and length == 1 and past >= known
        if self.queries == "all" or generated:
            return None
        if self.queries == "text":
            return roles[:, past:] != Role.VISUAL
        if self.roles is None:
            if kwargs.get("past_key_values") is None and not kwargs.get("use_cache"):
                raise ValueError(
                    "role_bias: queries='response' without roles= needs a KV cache (use_cache=True), else a prompt "
                    "and a response after it look the same; pass roles="
                )
            if past and length > 1:
                raise ValueError(
                    f"role_bias: queries='response' without roles=: {length} tokens after a cache of {past} may be a "
                    "prompt or a response; pass roles="
                )
        return query_mask(roles, "response")[:, past:] | _last(kwargs.get("attention_mask"), roles, past, length)


def _last(mask, roles: torch.Tensor, past: int, length: int) -> torch.Tensor:
    """The last real position of each row: bool [B, T]. mask: the model's attention mask: 2D, 4D, a dict of 4D, None."""
    if isinstance(mask, dict):  # by layer type
        mask = mask.get("full_attention", next(iter(mask.values())))
    real = torch.ones(len(roles), length, dtype=torch.bool, device=roles.device)
    if mask is not None and mask.dim() == 2:
        real = mask[:, past : past + length].to(roles.device).bool()
    elif mask is not None:
        seen = mask[:, 0].diagonal(offset=past, dim1=1, dim2=2)[:, :length]  # a padded token doesn't see itself
        real = (seen if seen.dtype == torch.bool else seen == 0).to(roles.device).expand_as(real)
    position = torch.arange(1, length + 1, device=roles.device) * real
    return real & (position == position.amax(dim=1, keepdim=True))


def _visual_ids(model: nn.Module) -> torch.Tensor:
    """Placeholder ids of the model's config; none where the image has layers of its own."""
    if any(cross_attends(module) for module in model.modules()):
        return torch.tensor([], dtype=torch.long)
    ids = {getattr(model.config, name, None) for name in ("image_token_id", "video_token_id")} - {None}
    if not ids:
        raise ValueError(
            f"role_bias: {type(model.config).__name__} has neither image_token_id nor video_token_id; pass roles="
        )
    return torch.tensor(sorted(ids))
