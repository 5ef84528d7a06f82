"""A core attention for megatron-core that runs where there is no GPU: torch's scaled_dot_product_attention.

megatron-core's own unfused attention allocates on a CUDA device and Transformer Engine needs one. This is for tests and
small runs; on a GPU the stock core attention is measured (`measuring.py`).
"""

from __future__ import annotations

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule

from verl_avar.attention.mass import _attend, _attend_range, _packed

CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


class SdpaCoreAttention(MegatronModule):
    """Constructor and forward pass of megatron-core's `DotProductAttention`, packed (`thd`) sequences included.

    Raises ValueError at construction for context parallelism, dropout, sliding windows and attention sinks.
    """

    def __init__(
        self,
        config,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection=None,
    ):
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        for name, value, wanted in (
            ("context_parallel_size", config.context_parallel_size, 1),
            ("attention_dropout", dropout, 0),
            ("window_size", config.window_size, None),
            ("softmax_type", config.softmax_type, "vanilla"),
        ):
            if value != wanted:
                raise ValueError(f"SdpaCoreAttention: {name}={value} is not supported; set {name}={wanted}")
        self.layer_number = layer_number
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale  # None: 1/√hn

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params=None,
    ) -> torch.Tensor:
        """query: [sq, b, np, hn] or packed [t, np, hn]; key and value likewise with the key heads.

        attention_mask: bool, True at what is hidden, broadcast to [b, np, sq, sk]; beside causality, where the mask
        type has it. Or verl's, for Transformer Engine: bool [b, sk], True at tokens, with the padding on the right,
        which causality hides. Returns [sq, b, np·hn] or [t, np·hn].
        """
        if attention_bias is not None:
            raise ValueError("SdpaCoreAttention: attention_bias is not supported")
        causal = (self.attn_mask_type if attn_mask_type is None else attn_mask_type) in CAUSAL
        if query.dim() == 3:
            if packed_seq_params is None or not causal or attention_mask is not None:
                raise ValueError("SdpaCoreAttention: packed rows want packed_seq_params, a causal mask type, no mask")
            heads = (part.transpose(0, 1)[None] for part in (query, key, value))
            # The padding behind a sequence comes after all of its tokens, which don't see it.
            out = _packed(*heads, None, borders(packed_seq_params).tolist(), self.softmax_scale, causal)
            return out[0].transpose(0, 1).flatten(-2)
        q, k, v = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        if attention_mask is not None and attention_mask.dim() == 2:
            if not causal or (attention_mask[:, 1:] & ~attention_mask[:, :-1]).any():
                raise ValueError("SdpaCoreAttention: a mask [b, sk] wants a causal mask type and padding on the right")
            attention_mask = None
        if attention_mask is None:
            out = _attend_range(q, k, v, None, self.softmax_scale, causal)
        else:
            if attention_mask.dim() != 4:
                raise ValueError(f"SdpaCoreAttention: attention_mask has {attention_mask.dim()} dimensions, not 2 or 4")
            seen = ~attention_mask
            if causal:
                seen = seen & torch.ones_like(q[0, 0, :, :1] @ k[0, 0, :, :1].T, dtype=torch.bool).tril()
            out = _attend(q, k, v, seen, scale=self.softmax_scale)
        return out.permute(2, 0, 1, 3).flatten(-2)


def borders(packed_seq_params) -> torch.Tensor:
    """Where the packed sequences of a row begin and end, padding between them included: int32 [N + 1]."""
    padded = packed_seq_params.cu_seqlens_q_padded
    return packed_seq_params.cu_seqlens_q if padded is None else padded
