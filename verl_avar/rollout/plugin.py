"""Entry point of `vllm.general_plugins`: runs in every vLLM process, front end, engine and workers."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger(__name__)

TESTED = ((0, 24), (0, 27))  # first and last vLLM minor version whose seams were checked
UNTESTED_ENV = "VERL_AVAR_UNTESTED_VLLM"
CPU_BACKEND = "verl_avar.rollout.backend_choice.CpuAttentionBackend"


def version_error(version: str) -> str | None:
    """What is wrong with this vLLM version, or None. `VERL_AVAR_UNTESTED_VLLM=1` lifts the check."""
    try:
        minor = tuple(int(part) for part in version.split(".")[:2])
    except ValueError:
        minor = ()
    if (len(minor) == 2 and TESTED[0] <= minor <= TESTED[1]) or os.environ.get(UNTESTED_ENV) == "1":
        return None
    low, high = (".".join(map(str, v)) for v in TESTED)
    return (
        f"verl_avar.rollout was tested with vLLM {low} to {high} and this is {version}: "
        f"install a version in that range, or set {UNTESTED_ENV}=1 to try anyway"
    )


def register() -> None:
    """Makes our backend selectable and checks request options early; changes no engine that doesn't ask for it.

    Out of the tested range nothing is registered, and an engine that asks for the connector fails with
    `version_error`. Idempotent. What fails is logged and raised again.
    """
    try:
        from verl_avar.compat import torchvision_ops

        torchvision_ops.apply()

        import vllm

        if version_error(vllm.__version__):
            return
        from vllm.platforms import current_platform

        from verl_avar.compat import vllm_request_check

        vllm_request_check.apply()
        if current_platform.is_cpu():
            from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

            from verl_avar.compat import vllm_cpu_linear, vllm_wide_kv_cache

            register_backend(AttentionBackendEnum.CPU_ATTN, CPU_BACKEND)
            vllm_cpu_linear.apply()
            vllm_wide_kv_cache.apply()
        elif current_platform.is_cuda():
            from verl_avar.compat import vllm_cuda_attention

            vllm_cuda_attention.apply(type(current_platform))
    except Exception:
        logger.exception("verl_avar: registering with vLLM failed")
        raise
