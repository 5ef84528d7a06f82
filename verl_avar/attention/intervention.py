"""The training-free intervention inside a transformers model, in forward passes and in `generate` (AVAR §2.3).

`role_bias` multiplies the attention of chosen queries to visual and system keys by c = exp(β) while it is open. What
is multiplied is its mode; which key plays which role comes from the roles given, or from the ids that the model sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GENERATION_MODES_MAPPING

from verl_avar.attention.bias import MODES, Effect, key_factors
from verl_avar.attention.layers import cross_attends
from verl_avar.attention.positions import QUERIES, Pass, Positions

# Module state, not thread-local: under gradient checkpointing autograd's threads call the attention functions again.
_biases: list[_Bias] = []
_SEARCHES = tuple(GenerationMode(name) for name in ("greedy_search", "sample", "beam_search", "beam_sample"))


class _Bias:
    """One open `role_bias`: its settings, and what the model's current forward pass looks like."""

    def __init__(self, model, visual, system, layers, queries, mode, roles):
        self.model, self.visual, self.system, self.mode = model, visual, system, mode
        self.only_layers = None if layers is None else frozenset(layers)
        # Other models that run meanwhile (a reference, a draft) are left alone.
        self.modules = {id(module) for module in model.modules()}
        self.crosses = any(cross_attends(module) for module in model.modules())
        self.positions = Positions(model, queries, roles)
        self.seen: Pass | None = None

    @property
    def idle(self) -> bool:
        return self.visual == self.system == 0.0

    def before_forward(self, _, args, kwargs) -> None:
        if not self.idle:
            self.seen = self.positions.of_pass(args, kwargs)

    def after_forward(self, _, args, kwargs, output) -> None:
        if not self.idle:
            self.positions.remember(self.seen, getattr(output, "past_key_values", None))
        if not torch.is_grad_enabled():  # else gradient checkpointing runs the layers again in the backward pass
            self.seen = None

    def effect(self, module: nn.Module, layer: int, query: torch.Tensor, key: torch.Tensor) -> Effect | None:
        """What this bias does in one attention call; None for nothing."""
        where = f"role_bias: layer {layer} ({type(module).__name__})"
        if self.seen is None:
            raise ValueError(
                f"{where} ran outside a forward pass of {type(self.model).__name__}; give role_bias the model you call"
            )
        if query.shape[0] != len(self.seen.roles) or (
            self.seen.selected is not None and query.shape[2] != self.seen.selected.shape[1]
        ):
            raise ValueError(
                f"{where} has {query.shape[0]} × {query.shape[2]} queries, the model was called with "
                f"{len(self.seen.roles)} × {self.seen.length} tokens; only layers over the whole sequence can be biased"
            )
        rows = None if self.seen.selected is None else self.seen.selected.to(key.device)
        if cross_attends(module):
            if self.mode == "bias":  # one factor for all keys drops out of the normalised weights
                return None
            factors = torch.full((key.shape[0], key.shape[2]), math.exp(self.visual), device=key.device)
            return Effect(factors, rows, self.visual, 0.0, self.mode)
        visual = 0.0 if self.crosses else self.visual  # there the sequence holds a marker, not the image
        if visual == self.system == 0.0:
            return None
        roles = self.seen.key_roles(layer, key.shape[2], where).to(key.device)
        return Effect(key_factors(roles, visual, self.system), rows, visual, self.system, self.mode)


def effect_on(module: nn.Module, layer: int, query: torch.Tensor, key: torch.Tensor) -> Effect | None:
    """What the open biases do in one attention call: that of the innermost one which covers the layer, if any."""
    for bias in reversed(_biases):
        if id(module) in bias.modules and (bias.only_layers is None or layer in bias.only_layers):
            return None if bias.idle else bias.effect(module, layer, query, key)
    return None


@contextmanager
def role_bias(
    model: nn.Module,
    *,
    visual: float = 0.0,
    system: float = 0.0,
    layers: Sequence[int] | None = None,
    queries: str = "all",
    mode: str = "bias",
    roles: torch.Tensor | None = None,
) -> Iterator[None]:
    """Multiplies attention to visual and system keys by c = exp(β) while open (AVAR §2.3); β = 0 changes nothing.

    model: the model that is called, with an attention of `hf.IMPLEMENTATIONS`, whole, wrapped or compiled (compiled
    code runs eagerly meanwhile). visual, system: β per role; `bias.bias_of` gives them for the paper's α_img, α_sys.
    mode, what is multiplied: `bias` the weights, then normalised (β added to the logits); `scale_weights` the weights,
    not normalised; `scale_logits` the logits. In a model with cross-attention (`layers.CROSS_ATTENTION`) the keys of
    those layers are the visual ones, all of them: `bias` drops out there, the other two modes act.
    layers: indices, all by default. With several open, the last one opened that covers a layer acts on it.
    queries: `all`; `text`, all but visual ones; `response`, those that produce response tokens (`roles.query_mask`),
    the last token of each row included, since what may follow it is a response.
    roles: uint8 [B, T] of the prompts or whole sequences as the model sees them, padding included; repeated where
    `generate` repeats rows (beams, num_return_sequences). Later tokens are response tokens, unbiased as keys. Without
    roles, VISUAL is found in the ids of each forward pass, by the config's image_token_id and video_token_id.
    Raises ValueError for unknown options or layers, for a β that is not finite or beyond `bias.MAX_BIAS`, for a
    system β without roles, and, in the forward pass, wherever roles or positions can't be known for sure.
    """
    for name, value, known in (("mode", mode, MODES), ("queries", queries, QUERIES)):
        if value not in known:
            raise ValueError(f"role_bias: unknown {name} '{value}'; use one of {', '.join(known)}")
    key_factors(torch.zeros(0, 0, dtype=torch.uint8), visual, system)  # a bad value is the caller's error, here
    if system != 0.0 and roles is None:
        raise ValueError(
            "role_bias: a system bias needs roles=, since ids alone don't tell the system turn; take them from "
            "verl_avar.template.ChatTemplate or verl_avar.roles.token_roles"
        )
    # Wrappers (PEFT, torch.compile, DDP) are not what `generate` calls.
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)
    _check_layers(inner, layers)
    bias = _Bias(inner, visual, system, layers, queries, mode, roles)
    hooks = [
        inner.register_forward_pre_hook(bias.before_forward, with_kwargs=True),
        inner.register_forward_hook(bias.after_forward, with_kwargs=True),
    ]
    _biases.append(bias)
    try:
        # Code compiled before the hooks were set does not look for them.
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        _biases.remove(bias)
        for hook in hooks:
            hook.remove()


def _check_layers(model: nn.Module, layers: Sequence[int] | None) -> None:
    """Raises ValueError where the text layers' attention can't be biased, or a layer asked for does not exist."""
    have = {
        module.layer_idx
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and str(getattr(getattr(module, "config", None), "_attn_implementation", "")).startswith("avar_")
    }
    if not have:
        raise ValueError(
            f"role_bias: {type(model).__name__} has no attention layer that can be biased; call "
            "verl_avar.attention.hf.set_attention(model) first"
        )
    if missing := sorted(set(layers or ()) - have):
        raise ValueError(f"role_bias: no layers {missing}; {type(model).__name__} has {sorted(have)}")


def generate_with_bias(**options: Any) -> Callable:
    """`model.generate(..., custom_generate=generate_with_bias(visual=0.14))`: one call to `generate` under a bias.

    options: those of `role_bias` but for the model. Greedy search, sampling and beam search. transformers hands a
    custom function no streamer and no `synced_gpus` (sharded parameters on several GPUs), and assisted generation not
    the draft model: there, open `role_bias` around `generate`, which does the same.
    """

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        search = generation_config.get_generation_mode()
        if search not in _SEARCHES:
            raise ValueError(
                f"generate_with_bias: {search.name.lower()} is not supported; open role_bias around generate instead"
            )
        with role_bias(model, **options):
            return getattr(model, GENERATION_MODES_MAPPING[search])(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                **model_kwargs,
            )

    return decode
