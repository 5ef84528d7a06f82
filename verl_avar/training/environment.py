"""Environment variables of a training run, set before torch, Ray or verl are imported; children inherit them."""

from __future__ import annotations

import os
import socket

ANY_MACHINE = {
    "VERL_ENGINE_VENDOR": "avar",  # selects our engine, see training/engine.py
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TRANSFORMERS_VERBOSITY": "error",  # verl makes transformers warn once per sample
}
CPU_MACHINE = {
    "VERL_PLATFORM": "cpu",
    "OMP_NUM_THREADS": "1",  # one thread a process: there are more processes than cores
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "RAY_prestart_worker_first_driver": "0",  # starts workers as they are needed, not one for each logical CPU
}


def prepare(cpu: bool) -> None:
    """Sets what is not set already. What the user exported wins, except that a CPU run is a CPU run."""
    for name, value in (ANY_MACHINE | CPU_MACHINE if cpu else ANY_MACHINE).items():
        os.environ.setdefault(name, value)
    if cpu:
        os.environ["VERL_PLATFORM"] = "cpu"


def single_process_group(port: int | None = None) -> None:
    """The variables torchrun would set, for a run of one process; nothing where torchrun set them.

    port: where the process group meets, on the loopback; a free one by default.
    Raises RuntimeError for a port in use.
    """
    if "RANK" in os.environ:
        return
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port(port))
    )


def free_port(port: int | None = None) -> int:
    """`port` if it is free on the loopback, or any free one. Raises RuntimeError for a port in use."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port or 0))
        except OSError:
            raise RuntimeError(
                f"port {port} is in use on this machine; choose another one or leave it out for a free one"
            ) from None
        return probe.getsockname()[1]
