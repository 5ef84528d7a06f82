"""Environment variables of a training run, set before torch, Ray or verl are imported; children inherit them."""

from __future__ import annotations

import os
import secrets
import socket

from verl_avar.compat.verl_weight_socket import RUN

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
    os.environ.setdefault(RUN, secrets.token_hex(4))
    for name, value in (ANY_MACHINE | CPU_MACHINE if cpu else ANY_MACHINE).items():
        os.environ.setdefault(name, value)
    if cpu:
        os.environ["VERL_PLATFORM"] = "cpu"


def single_process_group() -> None:
    """The variables torchrun would set, for a run of one process; nothing where torchrun set them.

    The group meets on the loopback, at MASTER_PORT where that is set, or at a free port.
    Raises RuntimeError for a port in use.
    """
    if "RANK" in os.environ:
        return
    port = free_port(fixed_port())
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def fixed_port() -> int | None:
    """The port that the user fixed by MASTER_PORT, if any. Raises RuntimeError for one that is no port."""
    text = os.environ.get("MASTER_PORT")
    if text is not None and not (text.isdigit() and 0 < int(text) < 65536):
        raise RuntimeError(f"MASTER_PORT is {text!r}, which is no port")
    return None if text is None else int(text)


def free_port(port: int | None = None) -> int:
    """`port` if it is free on the loopback, or any free one. Raises RuntimeError for a port in use."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port or 0))
        except OSError:
            raise RuntimeError(
                f"MASTER_PORT: port {port} is in use on this machine; choose another one, or unset it for a free one"
            ) from None
        return probe.getsockname()[1]
