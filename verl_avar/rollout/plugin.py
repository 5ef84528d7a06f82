"""Entry point of `vllm.general_plugins`: runs in every vLLM process, front end, engine and workers."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from packaging.version import InvalidVersion, Version

from verl_avar.rollout import CONNECTOR

logger = logging.getLogger(__name__)

# The vLLM releases whose seams are checked (tests/seams), one of every minor version of the range.
TESTED = ("0.24.0", "0.25.1", "0.26.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0")
UNTESTED_ENV = "VERL_AVAR_UNTESTED_VLLM"
NAME = "avar"  # among vLLM's plugins, as VLLM_PLUGINS spells it
CPU_BACKEND = "verl_avar.rollout.backend_choice.CpuAttentionBackend"

_registered = False
_lacking: str | None = None  # what this vLLM doesn't have


def version_error(version: str) -> str | None:
    """What is wrong with this vLLM version, or None. `VERL_AVAR_UNTESTED_VLLM=1` lifts the check.

    Pre-releases, development and local builds count as the release that they belong to; of the first release only
    later ones do.
    """
    low, high = Version(TESTED[0]), Version(TESTED[-1])
    try:
        this = Version(version)
        known = low <= this and this.release[:2] <= high.release[:2]
    except InvalidVersion:
        known = False
    if known or os.environ.get(UNTESTED_ENV) == "1":
        return None
    first, last = (f"{v.major}.{v.minor}" for v in (low, high))
    return (
        f"verl_avar.rollout was tested with vLLM {first} to {last} and this is {version}: "
        f"install a version in that range, or set {UNTESTED_ENV}=1 to try anyway"
    )


def problem() -> str | None:
    """Why an engine of this process can't have the connector, in one line, or None."""
    import vllm

    if error := version_error(vllm.__version__):
        return error
    if _lacking is not None:
        return f"verl_avar.rollout can't work with vLLM {vllm.__version__}: {_lacking}"
    if _registered:
        return None
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in allowed.split(","):
        return f"VLLM_PLUGINS={allowed!r} keeps vLLM from loading the plugin {NAME!r}: add it there, or unset that"
    return f"vLLM has not loaded the plugin {NAME!r}: install verl_avar in the environment of {sys.executable}"


def __getattr__(name: str) -> Any:
    """vLLM looks up the connector's class here, in the front end before it starts a process and again in each of them:
    what keeps it from working is said at once, before anything is imported that another vLLM may not have.

    Raises RuntimeError with `problem()`.
    """
    if name != CONNECTOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if error := problem():
        raise RuntimeError(error)
    from verl_avar.rollout.connector import VisualAttentionConnector

    return VisualAttentionConnector


def register() -> None:
    """Makes our backends selectable and checks request options early; changes no engine that doesn't ask for it.

    Out of the tested range nothing is registered. There, and where a seam is missing, other engines are left alone and
    one that asks for the connector fails with `problem`. Idempotent. Whatever else fails is logged and raised again.
    """
    global _registered, _lacking
    try:
        from verl_avar.compat import torchvision_ops

        torchvision_ops.apply()

        import vllm

        if version_error(vllm.__version__):
            return
        _apply()
        _registered = True
    except (ImportError, AttributeError) as error:
        _lacking = str(error)
        logger.error("%s; engines without its connector are not concerned", problem())
    except Exception:
        logger.exception("verl_avar: registering with vLLM failed")
        raise


def _apply() -> None:
    from vllm.platforms import current_platform

    from verl_avar.compat import vllm_request_check, vllm_scores_over_http, vllm_scores_per_choice

    vllm_request_check.apply()
    vllm_scores_per_choice.apply()
    vllm_scores_over_http.apply()
    if current_platform.is_cpu():
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        from verl_avar.compat import vllm_cpu_linear, vllm_wide_kv_cache

        register_backend(AttentionBackendEnum.CPU_ATTN, CPU_BACKEND)
        vllm_cpu_linear.apply()
        vllm_wide_kv_cache.apply()
    elif current_platform.is_cuda():
        from verl_avar.compat import vllm_cuda_attention

        vllm_cuda_attention.apply(type(current_platform))
