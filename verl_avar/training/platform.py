"""A verl platform for machines without an accelerator: `VERL_PLATFORM=cpu`.

verl 0.9.1 ships CUDA, ROCm and NPU platforms (verl/plugin/platform/). Choose ours by the environment variable; it is
never detected automatically, so that a GPU node with a broken driver fails instead of training on its CPU.
"""

from __future__ import annotations

import resource
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase


class CpuDevice(ModuleType):
    """What verl asks of `torch.cuda`, answered for a CPU: one device, and this process's memory as the device's."""

    def __getattr__(self, name: str) -> Any:  # Stream, synchronize, current_stream … where torch has them for CPU
        return getattr(torch.cpu, name)

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def set_device(self, device: Any) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def ipc_collect(self) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def get_device_name(self, device: Any = None) -> str:
        return "cpu"

    def memory_allocated(self, device: Any = None) -> int:
        """Resident memory of this process, in bytes."""
        return _resident()

    memory_reserved = memory_allocated

    def max_memory_allocated(self, device: Any = None) -> int:
        """Peak resident memory of this process, in bytes."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    max_memory_reserved = max_memory_allocated

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        pass

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        """Available and total memory of the machine, in bytes."""
        import psutil

        memory = psutil.virtual_memory()
        return memory.available, memory.total


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


_device = CpuDevice("verl_avar.training.platform.cpu")


class CpuPlatform(PlatformBase):
    """See verl/plugin/platform/platform_base.py for what each method means."""

    device_name = "cpu"
    vendor_name = "avar"
    device_module = _device

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return False  # never detected, only asked for

    def current_device(self) -> torch.device:
        return torch.device("cpu")  # an index would mean cuda

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str):
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return "GPU"  # a logical resource here: `ray_kwargs.ray_init.num_gpus` says how many training processes fit

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False  # weights reach the rollout through shared memory

    def cudart(self) -> None:
        return None
