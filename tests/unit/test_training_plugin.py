"""What `import verl` sets up in a process, and the CPU platform."""

import gc
import mmap
import os
import subprocess
import sys

import pytest
import torch


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=os.environ | environment
    )


def test_importing_verl_activates_the_plugin_without_its_heavy_parts():
    done = run(
        "import sys, verl\n"
        "from verl_avar.training.plugin import STATUS\n"
        "print(STATUS.active, STATUS.cpu, STATUS.error, 'vllm' in sys.modules, 'verl.workers' in sys.modules)"
    )
    assert done.stdout.split()[-5:] == ["True", "True", "None", "False", "False"], done.stderr


def test_patches_of_the_cpu_stay_out_of_other_machines():
    code = "import verl\nfrom verl_avar.training.plugin import STATUS\nprint(STATUS.cpu, *STATUS.patches)"
    done = run(code, VERL_PLATFORM="")
    assert done.stdout.split()[0] == "False" and "verl_gloo" not in done.stdout, done.stderr
    assert "verl_mrope_position_ids" in done.stdout


def test_failing_plugin_is_loud_and_remembered():
    done = run(
        "from verl_avar.compat import verl_versions\n"
        "verl_versions.TESTED = ('0.5.0', '0.6.0')\n"
        "import verl\n"
        "from verl_avar.training.plugin import STATUS\n"
        "print(STATUS.active, STATUS.error)"
    )
    assert "verl_avar: plugin failed in process" in done.stderr
    assert "patches verl 0.5.0 to 0.6.0, but verl 0.9.1 is installed" in done.stderr
    assert done.stdout.strip().startswith("False RuntimeError")


def test_engine_and_trainer_register_with_verl():
    from verl.workers.engine import EngineRegistry

    from verl_avar.training.engine import AvarFSDPEngine

    assert EngineRegistry.get_engine_cls("language_model", "fsdp2") is AvarFSDPEngine

    from verl.trainer.ppo.v1 import get_trainer_cls

    assert get_trainer_cls("avar_sync").__name__ == "AvarTrainer"


def test_cpu_platform_is_what_verl_sees():
    from verl.plugin.platform import get_platform
    from verl.utils import device

    platform = get_platform()
    assert (platform.device_name, platform.communication_backend_name()) == ("cpu", "gloo")
    assert device.get_device_id() == torch.device("cpu")
    assert not platform.is_ipc_supported()
    assert not platform.is_platform_available(use_smi_check=True)  # asked for, never detected


def test_memory_figures_are_this_process():
    from verl.utils.device import get_torch_device

    cpu = get_torch_device()
    gc.collect()
    before = cpu.memory_allocated()
    held = mmap.mmap(-1, 64 << 20)  # fresh pages; an allocator might hand out some that are resident already
    for _ in range(64):
        held.write(b"\1" * (1 << 20))
    assert cpu.memory_allocated() - before == pytest.approx(len(held), rel=0.2)
    assert cpu.max_memory_allocated() >= cpu.memory_allocated() * 0.99
    free, total = cpu.mem_get_info()
    assert 0 < free < total
