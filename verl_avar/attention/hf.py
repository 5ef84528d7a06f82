"""Masses and the intervention inside transformers models, through its attention registry.

Registers `avar_sdpa`, `avar_flash_attention_2`, `avar_flex_attention` and `avar_eager` with transformers'
AttentionInterface and AttentionMaskInterface. Each calls the attention function it is named after and, inside `probe`,
lets role indicators ride beside the values or makes one more call with them as values (see `mass.py`): padding masks,
packing and sequence parallelism that the function knows hold for the masses too. Outside `probe` and `role_bias`
nothing is added, and a compiled model stays one graph; inside, attention runs uncompiled.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from verl_avar.attention import visual
from verl_avar.attention.intervention import _biases, effect_on, generate_with_bias, role_bias
from verl_avar.attention.kernels import KERNELS, Call, Kernel
from verl_avar.attention.mass import output_and_mass, role_mass
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

IMPLEMENTATIONS = tuple(f"avar_{kernel.name}" for kernel in KERNELS)


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


def _wrapped(kernel: Kernel):
    """A transformers attention function that serves the open probes and biases."""

    @torch.compiler.disable(reason="an open probe or role_bias is Python state")
    def observed(*args, **options):
        call = Call(kernel, *args, options)
        effect = effect_on(call.module, call.layer, call.query, call.key)
        records = [record for record in _records if record.wants(call.layer)]
        if len(records) == 1 and effect is None and _rides(call, records[0]):
            return _output_and_note(records[0], call)
        output = call() if effect is None else effect.output(call, call.key, call.value)
        for record in records:
            roles = _key_roles(record, call)

            def masses(key, of, record=record, roles=roles):
                return _masses(call, key, roles, of, record.queries)

            mass = masses(call.key, record.of) if effect is None else effect.mass(masses, call.key, record.of)
            _note(record, call, roles, mass, effect)
        return output

    def attention(module, *args, **options):
        # Vision towers have no layer index.
        watched = getattr(module, "layer_idx", None) is not None and (_records or _biases)
        return (observed if watched else kernel.function)(module, *args, **options)

    return attention


def _note(record: Record, call: Call, roles: torch.Tensor, mass: torch.Tensor, effect=None) -> None:
    """Puts the masses of one call, under an intervention's effect on it if any, into a record."""
    if call.layer not in record._mass:  # gradient checkpointing comes here a second time
        record._mass[call.layer] = mass
        if record.visual is not None:
            visual.report(record, call, roles, mass, effect)


def _rides(call: Call, record: Record) -> bool:
    """Whether the masses come with the output, at an eighth of its cost, instead of by a call of their own."""
    if not call.widens or call.options.get("dropout"):  # dropout is no part of a mass
        return False
    if record.queries is None:
        return True
    start, stop = _range(record.queries)
    return 8 * (stop - start) > call.query.shape[2]


def _output_and_note(record: Record, call: Call) -> tuple:
    """The call's output, its masses noted."""
    rest = []

    def attend(query, key, value):
        output = call.kernel.function(
            call.module, query, key, value, call.mask, **call.options | {"scaling": call.scale}
        )
        rest.append(output[1])
        return output[0].transpose(1, 2)

    roles = _key_roles(record, call)
    output, mass = output_and_mass(call.query, call.key, call.value, roles, attend, record.of)
    _note(record, call, roles, _asked(mass, record.queries))
    return output.transpose(1, 2).contiguous(), rest[0]


def _range(queries: torch.Tensor) -> tuple[int, int]:
    """The range of positions that holds all queries asked for: bool [B, T]."""
    wanted = queries.any(dim=0).nonzero().flatten()
    return (int(wanted[0]), int(wanted[-1]) + 1) if len(wanted) else (0, 0)


def _asked(mass: torch.Tensor, queries: torch.Tensor | None) -> torch.Tensor:
    """Masses [B, H, T, R], 0 at queries not asked for."""
    return mass if queries is None else mass.masked_fill(~queries[:, None, :, None], 0.0)


def _key_roles(record: Record, call: Call) -> torch.Tensor:
    """Roles [B, S] of one layer's keys."""
    keys = (call.key.shape[0], call.key.shape[2])
    if call.crosses:
        return torch.full(keys, int(Role.VISUAL), dtype=torch.uint8, device=call.key.device)
    if tuple(record.roles.shape) != keys:
        raise ValueError(
            f"probe: layer {call.layer} ({type(call.module).__name__}) has {keys[0]} × {keys[1]} keys, the roles are "
            f"{' × '.join(map(str, record.roles.shape))}; pass roles as the model sees the tokens and run one full "
            "forward pass without a KV cache, or ask for other layers with layers=. A layer whose keys are not the "
            "sequence belongs in verl_avar.attention.layers.CROSS_ATTENTION"
        )
    return record.roles


def _masses(call: Call, key: torch.Tensor, roles: torch.Tensor, of, queries: torch.Tensor | None) -> torch.Tensor:
    """Masses [B, H, T, R] of one call on these keys; 0 at queries not asked for (queries: bool [B, T] or None)."""
    query, mask, ranges = call.query, call.mask, call.kernel.ranges
    start, stop = _range(queries) if ranges and queries is not None else (0, query.shape[2])
    if stop == start:
        mass = query.new_zeros(*query.shape[:2], 0, len(of), dtype=torch.float32)
    elif ranges and mask is None:
        mass = role_mass(query, key, roles, of=of, queries=(start, stop), scale=call.scale, causal=call.causal)
    else:
        if ranges and mask.shape[2] > 1:  # one row is broadcast over all queries
            mask = mask[:, :, start:stop]

        def attend(q, k, v):
            options = call.options | {"dropout": 0.0}
            return call.kernel.function(call.module, q, k, v, mask, **options)[0].transpose(1, 2)

        mass = role_mass(query[:, :, start:stop], key, roles, of=of, attend=attend)
    return _asked(nn.functional.pad(mass, (0, 0, start, query.shape[2] - stop)), queries)


def register() -> None:
    """Registers the implementations; importing this module does it."""
    for kernel in KERNELS:
        AttentionInterface.register(f"avar_{kernel.name}", _wrapped(kernel))
        AttentionMaskInterface.register(f"avar_{kernel.name}", ALL_MASK_ATTENTION_FUNCTIONS[kernel.name])


register()
