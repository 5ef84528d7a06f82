"""Masses and the intervention inside transformers models, through its attention registry.

Registers `avar_sdpa`, `avar_flash_attention_2`, `avar_flex_attention` and `avar_eager` with transformers'
AttentionInterface and AttentionMaskInterface. Each calls the attention function it is named after and, inside `probe`,
makes one more call of the same function with role indicators as values (see `mass.py`): padding masks, packing and
sequence parallelism that the function knows hold for the masses too. Outside `probe` and `role_bias` nothing is added,
and a compiled model stays one graph; inside, attention runs uncompiled.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from verl_avar.attention.intervention import _biases, effect_on, generate_with_bias, role_bias
from verl_avar.attention.layers import cross_attends
from verl_avar.attention.mass import role_mass
from verl_avar.attention.record import Record, _records, probe
from verl_avar.roles import Role

__all__ = [
    "IMPLEMENTATIONS",
    "Record",
    "attention_config",
    "generate_with_bias",
    "probe",
    "role_bias",
    "set_attention",
]

IMPLEMENTATIONS = ("avar_sdpa", "avar_flash_attention_2", "avar_flex_attention", "avar_eager")


def set_attention(model: nn.Module, implementation: str = "avar_sdpa", vision: str = "sdpa") -> None:
    """Switches a loaded model's text layers to `implementation`; its vision tower, if any, to `vision`."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown attention implementation '{implementation}'; use one of {', '.join(IMPLEMENTATIONS)}"
        )
    model.set_attn_implementation(attention_config(model.config, implementation, vision))


def attention_config(config, implementation: str = "avar_sdpa", vision: str = "sdpa") -> str | dict[str, str]:
    """The value of `attn_implementation` for this model config that leaves the vision tower on its own kernel."""
    parts = getattr(config, "sub_configs", None) or {}
    if "text_config" not in parts:
        return implementation
    return {"": implementation, "text_config": implementation} | {
        name: vision for name in parts if name.startswith("vision")
    }


def _with_masses(base, restrict: bool):
    """Wraps a transformers attention function. restrict: whether `base` can be called on a range of the queries."""

    @torch.compiler.disable
    def observed(module, query, key, value, attention_mask, layer, kwargs):
        crosses = cross_attends(module)
        if crosses:
            kwargs = kwargs | {"is_causal": False}
        effect = effect_on(module, layer, query, key)

        def attend(keys, values):
            return base(module, query, keys, values, attention_mask, **kwargs)

        output = attend(key, value) if effect is None else effect.output(attend, key, value)
        for record in _records:
            if record.wants(layer):
                roles = _key_roles(record, module, key, crosses)

                def masses(keys, of, roles=roles, rows=record.queries):
                    return _masses(base, restrict, module, query, keys, attention_mask, kwargs, roles, of, rows)

                mass = masses(key, record.of) if effect is None else effect.mass(masses, key, record.of)
                record._mass.setdefault(layer, mass)  # gradient checkpointing comes here a second time
        return output

    def attention(module, query, key, value, attention_mask, **kwargs):
        layer = getattr(module, "layer_idx", None)
        if layer is None or not (_records or _biases):  # vision towers have no layer index
            return base(module, query, key, value, attention_mask, **kwargs)
        return observed(module, query, key, value, attention_mask, layer, kwargs)

    return attention


def _key_roles(record: Record, module: nn.Module, key: torch.Tensor, crosses: bool) -> torch.Tensor:
    """Roles [B, S] of one layer's keys."""
    keys = (key.shape[0], key.shape[2])
    if crosses:
        return torch.full(keys, int(Role.VISUAL), dtype=torch.uint8, device=key.device)
    if tuple(record.roles.shape) != keys:
        raise ValueError(
            f"probe: layer {module.layer_idx} ({type(module).__name__}) has {keys[0]} × {keys[1]} keys, the roles are "
            f"{' × '.join(map(str, record.roles.shape))}; pass roles as the model sees the tokens and run one full "
            "forward pass without a KV cache, or ask for other layers with layers=. A layer whose keys are not the "
            "sequence belongs in verl_avar.attention.layers.CROSS_ATTENTION"
        )
    return record.roles


def _masses(base, restrict, module, query, key, attention_mask, kwargs, roles, of, queries) -> torch.Tensor:
    """Masses [B, H, T, R] of one layer; 0 at queries not asked for (queries: bool [B, T] or None)."""
    start, stop = 0, query.shape[2]
    if restrict and queries is not None:
        wanted = queries.any(dim=0).nonzero().flatten()
        start, stop = (int(wanted[0]), int(wanted[-1]) + 1) if len(wanted) else (0, 0)
    kwargs = kwargs | {"dropout": 0.0}
    if restrict and attention_mask is None and stop > start:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        scale = kwargs.get("scaling")
        mass = role_mass(query, key, roles, of=of, queries=(start, stop), scale=scale, causal=causal)
    elif stop > start:
        rows = attention_mask
        if restrict and attention_mask.shape[2] > 1:  # one row is broadcast over all queries
            rows = attention_mask[:, :, start:stop]

        def attend(q, k, v):
            return base(module, q, k, v, rows, **kwargs)[0].transpose(1, 2)

        mass = role_mass(query[:, :, start:stop], key, roles, of=of, attend=attend)
    else:
        mass = query.new_zeros(*query.shape[:2], 0, len(of), dtype=torch.float32)
    mass = nn.functional.pad(mass, (0, 0, start, query.shape[2] - stop))
    return mass if queries is None else mass.masked_fill(~queries[:, None, :, None], 0.0)


def eager_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, softcap=None, **kwargs):
    """Attention by the full map, kept for reference: returns the output [B, T, H, D] and the weights [B, H, T, S]."""
    groups = query.shape[1] // key.shape[1]
    logits = query @ repeat_kv(key, groups).transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if attention_mask is not None:
        logits = logits + attention_mask
    weights = logits.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    output = nn.functional.dropout(weights, dropout, module.training) @ repeat_kv(value, groups)
    return output.transpose(1, 2).contiguous(), weights


def _flash_attention_2(module, query, key, value, attention_mask, **kwargs):
    # transformers picks the flash library by the config's implementation name, which is ours here.
    config = copy.copy(module.config)
    config._attn_implementation_internal = "flash_attention_2"
    view = SimpleNamespace(
        config=config,
        is_causal=getattr(module, "is_causal", True),
        layer_idx=getattr(module, "layer_idx", None),
        modules=module.modules,
    )
    return flash_attention_forward(view, query, key, value, attention_mask, **kwargs)


def _flex_attention(module, query, *args, **kwargs):
    if query.is_cuda and _biases and not torch.compiler.is_compiling():
        # `role_bias` turns compiled code off; flex attention uncompiled would hold the whole map.
        with torch.compiler.set_stance("default"):
            return flex_attention_forward(module, query, *args, **kwargs)
    return flex_attention_forward(module, query, *args, **kwargs)


def register() -> None:
    """Registers the implementations; importing this module does it."""
    for base_name, base, restrict in (
        ("sdpa", sdpa_attention_forward, True),
        ("flash_attention_2", _flash_attention_2, False),
        ("flex_attention", _flex_attention, False),
        ("eager", eager_attention, True),
    ):
        AttentionInterface.register(f"avar_{base_name}", _with_masses(base, restrict))
        AttentionMaskInterface.register(f"avar_{base_name}", ALL_MASK_ATTENTION_FUNCTIONS[base_name])


register()
