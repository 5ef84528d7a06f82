"""FSDP2's CPU offload without pinned memory, on the CPU platform.

Why: verl offloads reference models with `CPUOffloadPolicy(pin_memory=True)`; pinning needs an accelerator.
Where: verl/workers/engine/fsdp/transformer_impl.py:451.
Versions: verl 0.9.1.
Applies to: VERL_PLATFORM=cpu.
Can go: when verl asks whether there is an accelerator to pin for.
"""

from __future__ import annotations

from contextlib import contextmanager

from verl_avar.compat.on_import import on_import


def apply() -> None:
    """Patch the FSDP engine's module when it is imported."""
    on_import("verl.workers.engine.fsdp.transformer_impl", patch)


@contextmanager
def patch(module):
    yield
    stock = module.CPUOffloadPolicy
    if getattr(stock, "unpinned", False):
        return

    def unpinned(pin_memory: bool = False):
        return stock(pin_memory=False)

    unpinned.unpinned = True
    module.CPUOffloadPolicy = unpinned
