"""Gives engines with our connector our attention backend on CUDA.

Why: vLLM picks the backend per layer and a KV connector has no say in it. Overriding registered backends, as on the CPU
(rollout/backend_choice.py), would also change vision towers: they ask the same entries for their own kernels. The
option `attention_backend` would be a second flag to keep in step with the first.
Where: vllm/platforms/cuda.py, `get_attn_backend_cls`: the choice for a decoder's layer, after all options are read.
Versions: vLLM 0.24 to 0.33.
Can go: when a KV connector can name the attention backend that it works with.
"""

from __future__ import annotations

from functools import wraps


def apply(platform: type) -> None:
    """Wrap the platform class's `get_attn_backend_cls` once. Idempotent."""
    from vllm.config import get_current_vllm_config_or_none

    from verl_avar.rollout import requested
    from verl_avar.rollout.backend_choice import gpu_backend

    stock = platform.get_attn_backend_cls.__func__
    if getattr(stock, "asks_for_ours", False):
        return

    @wraps(stock)
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None):
        if not requested(get_current_vllm_config_or_none()):
            return stock(cls, selected_backend, attn_selector_config=attn_selector_config, num_heads=num_heads)
        return gpu_backend(selected_backend, attn_selector_config, cls.get_device_capability())

    get_attn_backend_cls.asks_for_ours = True
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
