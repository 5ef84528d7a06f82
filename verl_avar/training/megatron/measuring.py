"""megatron-core's core attention, measured: the stock module for the output, and once more for the masses.

`measuring(cls)` is a subclass of a core attention (`TEDotProductAttention`, `DotProductAttention`,
`SdpaCoreAttention`): parameters, checkpoints and attributes stay those of the stock class. While a `probe` is open,
layers that it wants call the stock attention a second time with role indicators as values (see `attention/mass.py`),
so that masks, packing, scales and windows hold for the masses too. Put it into a layer spec (`measure_layer_spec`), or
into a model that a bridge has built already (`measure_model`).

Masses have this tensor-parallel rank's heads only. They carry no gradient: megatron-core's recomputation runs a layer's
first pass without one, so a loss on recorded masses would silently train nothing. `LayerObjective` puts AGTO into the
layers instead. Sequence parallelism needs nothing: core attention sees whole sequences.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import cache

import torch
from torch import nn

from verl_avar.attention.mass import role_mass
from verl_avar.attention.record import Record, _records
from verl_avar.training.megatron.layer_objective import _objectives


def check_config(config) -> None:
    """Raises ValueError for settings of a TransformerConfig under which masses would not be exact."""
    if config.context_parallel_size > 1:
        raise ValueError(
            f"AVAR measures whole sequences, context_parallel_size={config.context_parallel_size} splits them; set it "
            "to 1 (tensor and sequence parallelism are fine)"
        )
    if config.attention_dropout:
        raise ValueError(f"AVAR: attention_dropout={config.attention_dropout} would hit the masses too; set it to 0")
    for name in ("fp8", "fp8_dot_product_attention", "multi_latent_attention"):
        if getattr(config, name, False):
            raise ValueError(f"AVAR: {name} is not supported; turn it off")


@cache
def measuring(stock: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a core attention that serves open probes."""

    class Measuring(stock):
        def __init__(self, config, *args, **options):
            check_config(config)
            super().__init__(config, *args, **options)
            self.avar_layer = _layer_number(args, options) - 1

        def forward(self, query, key, value, attention_mask, *args, **options):
            attend = super().forward
            output = attend(query, key, value, attention_mask, *args, **options)
            layer = self.avar_layer
            for record in _records:
                if not record.wants(layer):
                    continue
                objective = next((o for o in _objectives if o.record is record), None)
                if objective is None and layer in record._mass:
                    continue  # recomputation

                def again(q, k, values):
                    rows = _to_stock(values, query)
                    return _from_stock(attend(query, key, rows, attention_mask, *args, **options), query)

                # Without an objective nothing flows back through the masses.
                with nullcontext() if objective is not None else torch.no_grad():
                    mass = _masses(record, layer, query, key, value, again)
                record._mass.setdefault(layer, mass.detach())
                if objective is not None:
                    output = objective.attach(output, mass, layer)
            return output

    Measuring.__name__ = Measuring.__qualname__ = f"Measuring{stock.__name__}"
    return Measuring


def measure_layer_spec(spec, stock: type[nn.Module] | None = None):
    """A copy of a layer spec, or of a block's spec with `layer_specs`, whose self-attention is measured.

    stock: a core attention to put there first, such as `SdpaCoreAttention`. Raises ValueError for a layer without one.
    """
    spec = copy.deepcopy(spec)
    for layer in getattr(spec, "layer_specs", None) or [spec]:
        attention = getattr(getattr(layer.submodules, "self_attention", None), "submodules", None)
        core = stock or getattr(attention, "core_attention", None)
        if attention is None or not isinstance(core, type):
            raise ValueError(
                f"AVAR: the layer spec of {layer.module} has no self-attention whose core_attention is a class "
                f"(it is {core!r}); only softmax attention can be measured"
            )
        attention.core_attention = measuring(core)
    return spec


def measure_model(model: nn.Module) -> list[int]:
    """Makes a built model's text layers measured, in place, and returns their indices.

    For bridges whose provider keeps the layer spec to itself. model: a `GPTModel`, or a multimodal model that has one
    as `language_model`; its vision tower and multi-token-prediction layers stay as they are.
    Raises ValueError where no layer can be measured.
    """
    layers = getattr(getattr(model, "language_model", model), "decoder", None)
    found = []
    for layer in getattr(layers, "layers", ()):
        core = getattr(getattr(layer, "self_attention", None), "core_attention", None)
        if core is None:
            continue  # a state-space or linear-attention layer
        check_config(layer.config)
        if not hasattr(core, "avar_layer"):
            core.__class__ = measuring(type(core))  # no parameter, buffer or checkpoint key changes
            core.avar_layer = layer.layer_number - 1
        found.append(core.avar_layer)
    if not found:
        raise ValueError(f"AVAR: {type(model).__name__} has no decoder layer with core_attention to measure")
    return found


def _layer_number(args: tuple, options: dict) -> int:
    return options["layer_number"] if "layer_number" in options else args[0]


def _masses(record: Record, layer: int, query, key, value, attend) -> torch.Tensor:
    """Masses [B, H, T, R] of one layer; 0 at queries not asked for."""
    if record.visual is not None:
        raise ValueError("probe: visual= is not supported on megatron-core")
    if key.shape[-1] != value.shape[-1]:
        raise ValueError(
            f"AVAR: layer {layer} has keys of {key.shape[-1]} and values of {value.shape[-1]} channels; not supported"
        )
    q, k = _heads(query), _heads(key)
    if tuple(record.roles.shape) != (k.shape[0], k.shape[2]):
        raise ValueError(
            f"probe: layer {layer} has {k.shape[0]} × {k.shape[2]} keys, the roles are "
            f"{' × '.join(map(str, record.roles.shape))}; pass roles as the layers see the tokens (padded or packed)"
        )
    mass = role_mass(q, k, record.roles, of=record.of, attend=attend)
    return mass if record.queries is None else mass.masked_fill(~record.queries[:, None, :, None], 0.0)


def _heads(rows: torch.Tensor) -> torch.Tensor:
    """[s, b, n, d] or packed [t, n, d] to [b, n, s, d]."""
    return rows.transpose(0, 1)[None] if rows.dim() == 3 else rows.permute(1, 2, 0, 3)


def _to_stock(heads: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[b, n, s, d] to [s, b, n, d], or to packed [t, n, d] where `like` is packed."""
    return (heads[0].transpose(0, 1) if like.dim() == 3 else heads.permute(2, 0, 1, 3)).contiguous()


def _from_stock(output: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """A core attention's output [s, b, n·d] or [t, n·d] to [b, n, s, d]."""
    return _heads(output.reshape(*query.shape[:-1], -1))
