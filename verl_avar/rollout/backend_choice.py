"""Decides, for the engine that is being built, between our attention backends and vLLM's own.

An engine without our connector gets the very class it would have had without this package.

CPU: vLLM resolves a registered backend with `getattr(module, name)` while the engine's config is current
(vllm/v1/attention/selector.py), so a module attribute computed on access is enough. CUDA: `gpu_backend`, asked by
compat/vllm_cuda_attention.py.
"""

from typing import Any


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


def gpu_backend(asked: Any, layer: Any, capability: Any) -> str:
    """The path of our GPU backend, for one layer of an engine that asks for the connector.

    asked: the backend that the engine's options name (an AttentionBackendEnum) or None. layer: the layer's
    AttentionSelectorConfig. capability: the GPU's. Raises NotImplementedError naming what the backend lacks, or the
    option that contradicts it.
    """
    from verl_avar.rollout.backend_gpu import PagedRoleBackend

    remedy = "or run this model without its kv_transfer_config"
    if asked is not None and asked.name != PagedRoleBackend.get_name():
        raise NotImplementedError(
            f"verl_avar.rollout: attention backend {asked.name} gives no scores and takes no bias: drop that option, "
            f"{remedy}"
        )
    lacking = PagedRoleBackend.validate_configuration(device_capability=capability, **layer._asdict())
    if lacking:
        raise NotImplementedError(
            f"verl_avar.rollout: the visual-attention backend can't serve this model ({', '.join(lacking)}; heads of "
            f"{layer.head_size}, {layer.dtype}, KV cache {layer.kv_cache_dtype}): change that, {remedy}"
        )
    return ".".join(PagedRoleBackend.full_cls_name())
