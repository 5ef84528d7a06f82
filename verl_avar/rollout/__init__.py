"""Rollouts on vLLM with a visual-attention score per response and an attention bias per request.

AVAR §2.3 and §3.3, arXiv:2603.03825.

Light: imports neither torch nor vLLM. `plugin.register` runs in every vLLM process; an engine that asks for the
connector (`kv_transfer_config`) gets our attention backend, every other engine stays stock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONNECTOR = "VisualAttentionConnector"
CONNECTOR_MODULE = "verl_avar.rollout.connector"


def kv_transfer_config(
    visual_bias: float = 0.0,
    system_bias: float = 0.0,
    attention_scores: str = "summary",
    attention_layers: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The `kv_transfer_config` that turns scores and biases on: for `LLM(...)`, `vllm serve` (as JSON) and verl
    (`actor_rollout_ref.rollout.engine_kwargs.vllm.kv_transfer_config`).

    The first three are the engine's defaults, and a request overrides them through `SamplingParams.extra_args`.
    attention_layers: the layers that are scored, all by default; a bias always works in every layer.
    Raises ValueError for a value out of range (see `options.RequestOptions`, `probed_layers.check_layers`).
    """
    from verl_avar.rollout.options import LAYERS_KEY, RequestOptions
    from verl_avar.rollout.probed_layers import check_layers

    check_layers(attention_layers)
    layers = {} if attention_layers is None else {LAYERS_KEY: list(attention_layers)}
    defaults = RequestOptions(visual_bias, system_bias, attention_scores)
    return {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": CONNECTOR_MODULE,
        # vLLM wants a role; as "consumer" it expects nothing to be handed on when a request ends.
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": defaults.as_dict() | layers,
    }


def requested(vllm_config: Any) -> bool:
    """Whether this engine's `kv_transfer_config` names our connector."""
    transfer = getattr(vllm_config, "kv_transfer_config", None)
    return (
        transfer is not None
        and transfer.kv_connector == CONNECTOR
        and transfer.kv_connector_module_path == CONNECTOR_MODULE
    )
