"""Process groups over gloo alone, and no NUMA binding by GPU, on the CPU platform.

Why: verl asks torch for the backend "cpu:gloo,<device>:<backend>", which on a CPU is "cpu:gloo,cpu:gloo"; torch
refuses a device named twice. `set_numa_affinity` asks NVML for a GPU and prints a warning in every worker.
Where: verl/utils/distributed.py:39, :69, :88.
Versions: verl 0.9.1.
Applies to: VERL_PLATFORM=cpu.
Can go: when verl names each device once.
"""

from __future__ import annotations

import os
from contextlib import contextmanager

from verl_avar.compat.on_import import on_import


def apply() -> None:
    """Patch verl.utils.distributed when it is imported."""
    on_import("verl.utils.distributed", patch)


@contextmanager
def patch(module):
    yield
    over_ray = module.initialize_global_process_group_ray
    if getattr(over_ray, "gloo", False):
        return

    def initialize_global_process_group_ray(timeout_second=None, backend=None):
        over_ray(timeout_second=timeout_second, backend=backend or "gloo")

    def initialize_global_process_group(timeout_second=36000):
        initialize_global_process_group_ray(timeout_second)
        return tuple(int(os.environ[name]) for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"))

    initialize_global_process_group_ray.gloo = True
    module.initialize_global_process_group_ray = initialize_global_process_group_ray
    module.initialize_global_process_group = initialize_global_process_group
    module.set_numa_affinity = lambda: None
