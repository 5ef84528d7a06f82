"""Ulysses sequence parallelism for the measuring attention: each rank attends with some heads over the whole row.

verl's own exchange lives inside flash-attn, past transformers' attention registry where masses are measured. Here it
goes around the registered function (`avar_sdpa_ulysses` calls `avar_sdpa`), which then sees the whole packed row with
H/sp of the heads: masses of local heads, at every query. DeepSpeed Ulysses: arXiv:2309.14509.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.distributed import ProcessGroup
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from verl.models.transformers.monkey_patch import patch_vlm_for_ulysses_input_slicing
from verl.utils.ulysses import gather_heads_scatter_seq, gather_seq_scatter_heads

from verl_avar.attention.hf import attention_config

KERNELS = ("sdpa", "flash_attention_2")
# Models whose text model verl can hand a slice of the row, with nothing but attention to look beyond it.
MODELS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")


@dataclass
class WholeRow:
    """The packed row of which every rank of `group` holds a slice: lengths of its parts, padding among them."""

    group: ProcessGroup
    lengths: Sequence[int]
    device: torch.device

    @cached_property
    def positions(self) -> torch.Tensor:
        """Positions within each part: int64 [1, T]."""
        return torch.cat([torch.arange(length, device=self.device) for length in self.lengths])[None]

    @cached_property
    def mask(self) -> torch.Tensor | None:
        """Causal attention within each part, bool [1, 1, T, T], one for all layers; None for a row of one part."""
        if len(self.lengths) == 1:
            return None
        part = torch.repeat_interleave(torch.tensor(self.lengths, device=self.device))
        return ((part == part[:, None]).tril_())[None, None]


_rows: list[WholeRow] = []


@contextmanager
def whole_row(group: ProcessGroup, lengths: Sequence[int], device: torch.device) -> Iterator[WholeRow]:
    """The row in the model while open; under gradient checkpointing, until the backward pass is done."""
    _rows.append(WholeRow(group, lengths, device))
    try:
        yield _rows[-1]
    finally:
        _rows.pop()


def set_ulysses_attention(model: torch.nn.Module, kernel: str, size: int) -> None:
    """Prepares a loaded model for rows cut into `size` slices.

    Raises ValueError for a model, a kernel or a number of heads that this can't be exact for.
    """
    model_type, sizes = model.config.model_type, model.config.get_text_config()
    asked = f"ulysses_sequence_parallel_size={size}"
    if model_type not in MODELS:
        raise ValueError(f"{asked}: {model_type} is none of {', '.join(MODELS)}; set it to 1")
    if "sliding_attention" in (getattr(sizes, "layer_types", None) or ()):
        raise ValueError(f"{asked}: the model has sliding-window layers; set it to 1")
    if kernel not in KERNELS:
        raise ValueError(f"{asked}: works with attn_implementation {' or '.join(KERNELS)}, not {kernel}")
    heads, key_value_heads = sizes.num_attention_heads, sizes.num_key_value_heads
    if heads % size or key_value_heads % size:
        raise ValueError(f"{asked}: must divide the model's {heads} heads and its {key_value_heads} key-value heads")
    text_model = type(model.model.language_model)
    if not getattr(text_model.forward, "slices_its_input", False):
        patch_vlm_for_ulysses_input_slicing(text_model)
        text_model.forward.slices_its_input = True
    model.set_attn_implementation(attention_config(model.config, f"avar_{kernel}_ulysses", vision=kernel))


def _around(kernel: str):
    """The attention function of transformers' registry that exchanges sequence for heads around `avar_<kernel>`."""

    def attention(module, query, key, value, attention_mask, **options):
        """query [1, H, T/sp, D]; key, value [1, H_kv, T/sp, D]. Returns [1, T/sp, H, D]."""
        row = _rows[-1]
        query, key, value = (
            gather_seq_scatter_heads(part, seq_dim=2, head_dim=1, group=row.group) for part in (query, key, value)
        )
        mask = row.mask if kernel == "sdpa" else None  # flash-attn finds the parts by their positions
        output, weights = ALL_ATTENTION_FUNCTIONS[f"avar_{kernel}"](
            module, query, key, value, mask, **options | {"position_ids": row.positions}
        )
        return gather_heads_scatter_seq(output, head_dim=2, seq_dim=1, group=row.group), weights

    return attention


def _no_mask(*args, **options) -> None:
    """A mask over a slice means nothing: the row's comes from `WholeRow`."""


for _kernel in KERNELS:
    AttentionInterface.register(f"avar_{_kernel}_ulysses", _around(_kernel))
    AttentionMaskInterface.register(f"avar_{_kernel}_ulysses", _no_mask)
