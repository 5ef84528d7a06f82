"""Decides, for the engine that is being built, between our CPU attention backend and vLLM's own.

vLLM resolves a registered backend with `getattr(module, name)` while the engine's config is current
(vllm/v1/attention/selector.py), so a module attribute computed on access is enough: an engine without our connector
gets the very class it would have had without this package.
"""


def __getattr__(name: str) -> type:
    if name != "CpuAttentionBackend":
        raise AttributeError(name)
    from vllm.config import get_current_vllm_config

    from verl_avar.rollout import requested

    if requested(get_current_vllm_config()):
        from verl_avar.rollout.backend_cpu import RoleAttentionBackend

        return RoleAttentionBackend
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return CPUAttentionBackend
