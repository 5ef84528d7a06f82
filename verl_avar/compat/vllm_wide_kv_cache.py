"""Lets our CPU attention ask for KV-cache rows that are wider than the model's heads.

Why: the roles ride in extra columns of the KV cache (rollout/backend_cpu.py), and vLLM takes the width of a cache row
from the model's head size; a backend has no say in it.
Where: vllm/model_executor/layers/attention/attention.py, `Attention.get_kv_cache_spec`.
Versions: vLLM 0.24 to 0.33.
Applies to: layers that run our CPU attention; every other layer keeps its spec.
Can go: when an attention backend can state the size of its own cache rows.
"""

from __future__ import annotations

from functools import wraps


def apply() -> None:
    """Wrap `get_kv_cache_spec` once. Idempotent."""
    from vllm.model_executor.layers.attention.attention import Attention

    stock = Attention.get_kv_cache_spec
    if getattr(stock, "asks_the_backend", False):
        return

    @wraps(stock)
    def get_kv_cache_spec(self, vllm_config):
        return _as_wide_as(self.impl, stock(self, vllm_config))

    get_kv_cache_spec.asks_the_backend = True
    Attention.get_kv_cache_spec = get_kv_cache_spec


def _as_wide_as(impl, spec):
    from dataclasses import replace

    from verl_avar.rollout.backend_cpu import RoleAttention

    if not isinstance(impl, RoleAttention):
        return spec
    return replace(spec, head_size=impl.head_size, head_size_v=impl.head_size)
