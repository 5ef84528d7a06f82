"""The attention functions of transformers that are wrapped, and one call of them as an object."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from verl_avar.attention.intervention import _biases
from verl_avar.attention.layers import cross_attends


@dataclass(frozen=True)
class Kernel:
    """One of transformers' attention functions, and what differs between them."""

    name: str
    function: Callable
    ranges: bool  # takes a range of the queries, with the same rows of the mask
    caps: bool  # applies the model's softcap to the logits
    causal: bool = True  # without a mask, where the layer does not say otherwise


@dataclass
class Call:
    """One call of an attention function by transformers: query [B, H, T, D], key and value [B, H_kv, S, D]."""

    kernel: Kernel
    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: Any  # None, bool or float [B, 1 or H, T, S], int [B, S] (flash), BlockMask (flex)
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        self.crosses = cross_attends(self.module)
        if self.crosses:
            self.options = self.options | {"is_causal": False}

    @property
    def layer(self) -> int:
        return self.module.layer_idx

    @property
    def scale(self) -> float:
        """Of the logits."""
        return self.options.get("scaling") or self.query.shape[-1] ** -0.5

    @property
    def causal(self) -> bool:
        """Whether this call is causal where it has no mask."""
        causal = self.options.get("is_causal")
        causal = getattr(self.module, "is_causal", True) if causal is None else causal
        return bool(causal) and self.kernel.causal and self.query.shape[2] > 1

    @property
    def widens(self) -> bool:
        """Whether the kernel takes a few more columns at little cost; on CUDA that is not known."""
        same = self.query.shape[-1] == self.value.shape[-1]
        return self.kernel.name == "eager" or (self.kernel.name == "sdpa" and self.query.device.type == "cpu" and same)

    def __call__(self, key=None, value=None, **options) -> tuple:
        """The kernel's output [B, T, H, D] and whatever it returns beside it, on other keys or values if given."""
        key, value = self.key if key is None else key, self.value if value is None else value
        return self.kernel.function(self.module, self.query, key, value, self.mask, **(self.options | options))

    def positions(self) -> torch.Tensor:
        return torch.arange(self.query.shape[2], device=self.query.device)

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits with the model's softcap, where the kernel applies it (sdpa ignores it)."""
        cap = self.options.get("softcap") if self.kernel.caps else None
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def masked(self, logits: torch.Tensor, b: int, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Logits [H, n, V] of sequence b, queries `rows` and keys `columns`, under what this call lets them see."""
        mask = self.mask
        if isinstance(mask, BlockMask):
            index = torch.tensor(b, device=rows.device), torch.tensor(0, device=rows.device)
            seen = mask.mask_mod(*index, rows[:, None], columns[None, :])
        elif self.kernel.name == "flash_attention_2":
            seen = self._seen_by_flash(b, rows, columns)
        elif mask is None:
            seen = columns <= rows[:, None] if self.causal else columns[None] >= 0
        else:
            mask = mask.expand(len(self.query), -1, self.query.shape[2], -1)[b][:, rows][..., columns]
            if mask.dtype != torch.bool:
                return logits + mask.float()
            seen = mask
        return logits.masked_fill(~seen, -torch.inf)

    def _seen_by_flash(self, b: int, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        ids = self.options.get("position_ids")
        restarts = len(self.query) == 1 and ids is not None and ids.dim() == 2 and bool((ids.diff(dim=-1) != 1).any())
        if self.options.get("cu_seq_lens_q") is not None or (self.mask is None and restarts):
            raise ValueError("probe: visual= wants padded rows; FlashAttention sees several sequences packed into one")
        seen = columns <= rows[:, None] if self.causal else (columns[None] >= 0).expand(len(rows), -1)
        if (window := self.options.get("sliding_window")) is not None:
            seen = seen & (rows[:, None] - columns < window)
        if self.mask is not None:
            seen = seen & self.mask[b, columns].bool()
        return seen


def flash_attention_2(module, query, key, value, attention_mask, **options):
    """transformers' FlashAttention 2 under another name."""
    # transformers picks the flash library by the config's implementation name, which is ours here.
    config = copy.copy(module.config)
    config._attn_implementation_internal = "flash_attention_2"
    view = SimpleNamespace(
        config=config,
        is_causal=getattr(module, "is_causal", True),
        layer_idx=getattr(module, "layer_idx", None),
        modules=module.modules,
    )
    return flash_attention_forward(view, query, key, value, attention_mask, **options)


def flex_attention(module, query, *args, **options):
    """transformers' FlexAttention."""
    if query.is_cuda and _biases and not torch.compiler.is_compiling():
        # `role_bias` turns compiled code off; FlexAttention uncompiled would hold the whole map.
        with torch.compiler.set_stance("default"):
            return flex_attention_forward(module, query, *args, **options)
    return flex_attention_forward(module, query, *args, **options)


def eager_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, softcap=None, **options):
    """Attention by the full map, kept for reference: returns the output [B, T, H, D] and the weights [B, H, T, S]."""
    if options.get("s_aux") is not None:
        raise ValueError(f"avar_eager: {type(module).__name__} has attention sinks, which this attention does not know")
    groups = query.shape[1] // key.shape[1]
    logits = query @ repeat_kv(key, groups).transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if attention_mask is not None:
        logits = logits + attention_mask
    weights = logits.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    output = nn.functional.dropout(weights, dropout, module.training) @ repeat_kv(value, groups)
    return output.transpose(1, 2).contiguous(), weights


KERNELS = (
    Kernel("sdpa", sdpa_attention_forward, ranges=True, caps=False),
    Kernel("flash_attention_2", flash_attention_2, ranges=False, caps=True),
    Kernel("flex_attention", flex_attention, ranges=False, caps=True),
    Kernel("eager", eager_attention, ranges=True, caps=True, causal=False),
)
