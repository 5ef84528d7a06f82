"""Masses and role bias inside transformers models, through its attention registry.

Registers `avar_sdpa`, `avar_flash_attention_2` and `avar_eager` with transformers' AttentionInterface and
AttentionMaskInterface. Each calls the attention function it is named after and, inside `probe`, makes one more call of
the same function with role indicators as values (see `mass.py`): padding masks, packing and sequence parallelism that
the function knows hold for the masses too. Outside `probe` and `role_bias` nothing is added.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from verl_avar.attention.bias import biased, biased_mass, key_factors
from verl_avar.attention.mass import MASS_ROLES, role_mass
from verl_avar.roles import Role

IMPLEMENTATIONS = ("avar_sdpa", "avar_flash_attention_2", "avar_eager")


@dataclass
class Record:
    """Masses of one forward pass, by layer; filled by the attention functions while a `probe` is open."""

    roles: torch.Tensor  # uint8 [B, T]
    queries: torch.Tensor | None  # bool [B, T]
    only_layers: frozenset[int] | None
    of: tuple[Role, ...]
    _mass: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> [B, H, T, R]

    @property
    def layers(self) -> list[int]:
        """Indices of the layers that reported, ascending."""
        return sorted(self._mass)

    def mass(self, role: Role) -> torch.Tensor:
        """Mass of `role`: float32 [L, B, H, T], layers as in `layers`; 0 at queries that were not asked for.

        Raises RuntimeError where no layer, or not every layer asked for, reported.
        """
        if not self._mass:
            raise RuntimeError(
                "probe: no attention layer reported a mass; load the model with one of "
                f"{', '.join(IMPLEMENTATIONS)} (verl_avar.attention.hf.set_attention), and check the layers asked for"
            )
        if missing := sorted((self.only_layers or frozenset()) - self._mass.keys()):
            raise RuntimeError(f"probe: no mass from layers {missing}; the model has {self.layers} of those asked for")
        column = self.of.index(role)
        return torch.stack([self._mass[layer][..., column] for layer in self.layers])


@dataclass(frozen=True)
class _Bias:
    roles: torch.Tensor
    visual: float
    system: float
    only_layers: frozenset[int] | None

    def factors(self, length: int) -> torch.Tensor:
        """c for `length` keys [B, length]; keys past the roles given are tokens generated since, unbiased."""
        factors = key_factors(self.roles, self.visual, self.system)
        if length < factors.shape[1]:
            raise ValueError(f"role_bias: {factors.shape[1]} roles for {length} keys")
        return nn.functional.pad(factors, (0, length - factors.shape[1]), value=1.0)


# Module state, not thread-local: under gradient checkpointing autograd's threads call the attention functions again.
_records: list[Record] = []
_biases: list[_Bias] = []


@contextmanager
def probe(
    roles: torch.Tensor,
    queries: torch.Tensor | None = None,
    layers: Sequence[int] | None = None,
    of: Sequence[Role] = MASS_ROLES,
) -> Iterator[Record]:
    """Collects the masses of every text layer's attention while open. One full forward pass per probe (no KV cache).

    roles: uint8 [B, T] as the model sees the tokens (padded, or packed into one row). queries: bool [B, T], the
    queries wanted, all by default. layers: indices wanted, all by default; the others pay nothing. of: roles wanted.
    Under gradient checkpointing (non-reentrant only) keep it open until the backward pass is done: the recomputation
    must run the same operations. Its calls are not recorded a second time.
    """
    record = Record(roles, queries, None if layers is None else frozenset(layers), tuple(of))
    _records.append(record)
    try:
        yield record
    finally:
        _records.remove(record)


@contextmanager
def role_bias(
    roles: torch.Tensor, visual: float = 0.0, system: float = 0.0, layers: Sequence[int] | None = None
) -> Iterator[None]:
    """Adds a bias to the logits of visual and system keys in every text layer while open (AVAR §2.3).

    roles: uint8 [B, T] of the prompt or the whole sequence; in `generate`, later tokens are unbiased keys. All queries
    are biased. Raises ValueError for a bias that is not finite or beyond `bias.MAX_BIAS`.
    """
    bias = _Bias(roles, visual, system, None if layers is None else frozenset(layers))
    key_factors(roles[:, :0], visual, system)  # a bad value is the caller's error here, not a layer's later
    _biases.append(bias)
    try:
        yield
    finally:
        _biases.remove(bias)


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

    def attention(module, query, key, value, attention_mask, **kwargs):
        layer = getattr(module, "layer_idx", None)
        if layer is None or not (_records or _biases):  # vision towers have no layer index
            return base(module, query, key, value, attention_mask, **kwargs)
        bias = next((b for b in reversed(_biases) if b.only_layers is None or layer in b.only_layers), None)
        if bias is None:
            output = base(module, query, key, value, attention_mask, **kwargs)
        else:
            factors = bias.factors(key.shape[2])
            output = (
                biased(lambda v: base(module, query, key, v, attention_mask, **kwargs)[0], value, factors),
                None,
            )
        for record in _records:
            if record.only_layers is None or layer in record.only_layers:
                mass = _layer_mass(base, restrict, record, module, query, key, attention_mask, kwargs)
                if bias is not None:
                    mass = biased_mass(mass, record.of, bias.visual, bias.system)
                record._mass.setdefault(layer, mass)
        return output

    return attention


def _layer_mass(base, restrict, record: Record, module, query, key, attention_mask, kwargs) -> torch.Tensor:
    """Masses [B, H, T, R] of one layer, 0 at queries not asked for."""
    start, stop = 0, query.shape[2]
    if restrict and record.queries is not None:
        wanted = record.queries.any(dim=0).nonzero().flatten()
        start, stop = (int(wanted[0]), int(wanted[-1]) + 1) if len(wanted) else (0, 0)
    kwargs = kwargs | {"dropout": 0.0}
    if restrict and attention_mask is None and stop > start:
        scale = kwargs.get("scaling")
        mass = role_mass(query, key, record.roles, of=record.of, queries=(start, stop), scale=scale)
    elif stop > start:
        rows = attention_mask if not restrict else attention_mask[:, :, start:stop]

        def attend(q, k, v):
            return base(module, q, k, v, rows, **kwargs)[0].transpose(1, 2)

        mass = role_mass(query[:, :, start:stop], key, record.roles, of=record.of, attend=attend)
    else:
        mass = query.new_zeros(*query.shape[:2], 0, len(record.of), dtype=torch.float32)
    mass = nn.functional.pad(mass, (0, 0, start, query.shape[2] - stop))
    if record.queries is not None:
        mass = mass.masked_fill(~record.queries[:, None, :, None], 0.0)
    return mass


def eager_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention by the full map, kept for reference: returns the output [B, T, H, D] and the weights [B, H, T, S]."""
    groups = query.shape[1] // key.shape[1]
    logits = query @ repeat_kv(key, groups).transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
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


def register() -> None:
    """Registers the three implementations; importing this module does it."""
    for base_name, base, restrict in (
        ("sdpa", sdpa_attention_forward, True),
        ("flash_attention_2", _flash_attention_2, False),
        ("eager", eager_attention, True),
    ):
        AttentionInterface.register(f"avar_{base_name}", _with_masses(base, restrict))
        AttentionMaskInterface.register(f"avar_{base_name}", ALL_MASK_ATTENTION_FUNCTIONS[base_name])


register()
