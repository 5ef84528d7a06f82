"""Entry point of `verl.plugins`: verl imports this module in every process, and importing it is what acts.

It registers the CPU platform, and has our engine and trainer registered and upstream's faults patched when the verl
modules concerned are imported. It imports neither vLLM nor transformers.

A failure is printed and kept in `STATUS`, which `avar doctor` reads; a process that needs what is missing then fails
with verl's own error ("Unknown platform", an engine that isn't there) right after our line.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Status:
    """What the plugin did in this process."""

    active: bool = False
    cpu: bool = False  # VERL_PLATFORM=cpu
    patches: list[str] = field(default_factory=list)  # names of compat modules applied, or waiting for their module
    error: str | None = None


STATUS = Status()

PATCHES = ("torchvision_ops", "verl_mrope_position_ids", "verl_text_only_batch", "verl_vllm_cpu", "verl_weight_socket")
CPU_PATCHES = ("verl_gloo", "verl_offload_pinning")


def activate() -> Status:
    """Registers and patches. Raises what fails; idempotent."""
    if STATUS.active:
        return STATUS
    from importlib import import_module

    from verl_avar.compat import verl_versions
    from verl_avar.compat.on_import import on_import

    verl_versions.check()
    STATUS.cpu = os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"
    for name in PATCHES + (CPU_PATCHES if STATUS.cpu else ()):
        import_module(f"verl_avar.compat.{name}").apply()
        STATUS.patches.append(name)

    from verl.plugin.platform.platform_manager import PlatformRegistry

    from verl_avar.training.platform import CpuPlatform

    PlatformRegistry.register(platform="cpu")(CpuPlatform)
    on_import("verl.workers.engine", _followed_by("verl_avar.training.engine"))
    on_import("verl.workers.engine", _with_megatron)
    on_import("verl.workers.rollout.base", _with_weight_sync)
    on_import("verl.trainer.ppo.v1", _followed_by("verl_avar.training.rl_trainer"))
    STATUS.active = True
    return STATUS


def _followed_by(name: str):
    """A patch that imports our module `name`, which registers itself with verl, after verl's."""

    @contextmanager
    def patch(module):
        yield
        from importlib import import_module

        import_module(name)

    return patch


@contextmanager
def _with_megatron(engines):
    """The engine for verl's Megatron backend, where verl could import its own."""
    yield
    if engines.MegatronEngine is not None:
        from importlib import import_module

        import_module("verl_avar.training.megatron.engine")


@contextmanager
def _with_weight_sync(rollouts):
    """The client of vLLM servers whose weight syncs fail instead of hanging."""
    yield
    rollouts._ROLLOUT_REGISTRY[("vllm", "async")] = "verl_avar.training.weight_sync.ImpatientServerAdapter"


try:
    activate()
except Exception as error:
    # Raising would lose it: verl logs a plugin's exception at DEBUG and Python forgets the module.
    STATUS.error = f"{type(error).__name__}: {error}"
    print(f"verl_avar: plugin failed in process {os.getpid()}: {STATUS.error}", file=sys.stderr, flush=True)
