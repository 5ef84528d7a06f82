"""A server of our own for one evaluation: `avar serve MODEL` on the loopback, ended with it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from verl_avar.errors import ConfigError
from verl_avar.evaluation.benchmark.orphans import end_with_parent
from verl_avar.evaluation.sweep_engine import CPU_KV_CACHE

ERROR = re.compile(r"\w*Error: ")
START_S, STOP_S, POLL_S = 1800.0, 60.0, 0.5


@contextmanager
def served(model: str, name: str, log: Path, options: Sequence[str] = ()) -> Iterator[str]:
    """Serves a checkpoint while the context is open; yields the base URL, http://127.0.0.1:PORT/v1.

    options: further ones of `avar serve`, after those of `on_cpu`. Raises ConfigError, with the server's last words,
    where it does not start.
    """
    import httpx

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "verl_avar.cli", "serve", model, "--served-model-name", name]
    command += ["--host", "127.0.0.1", "--port", str(port), *on_cpu(options), *options]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            preexec_fn=end_with_parent(signal.SIGTERM),  # at which it ends its engine
        )
    try:
        end = time.monotonic() + START_S
        with httpx.Client(trust_env=False) as client:
            while not _healthy(client, port):
                if process.poll() is not None or time.monotonic() > end:
                    raise ConfigError(f"{model} can't be served: {last_words(log)} (all of it in {log})")
                time.sleep(POLL_S)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def on_cpu(options: Sequence[str]) -> list[str]:
    """Without a GPU: room for keys and values, of which vLLM would take nine tenths of the machine's memory; no
    compiling, which takes longer than an evaluation of a model that a CPU can run; and float32, in which an answer
    hardly ever depends on what else is asked at the time, as it does in bfloat16."""
    import torch

    if torch.cuda.is_available():
        return []
    said = "VLLM_CPU_KVCACHE_SPACE" in os.environ or any(
        word.startswith(("--kv-cache-memory-bytes", "--gpu-memory-utilization")) for word in options
    )
    room = [] if said else ["--kv-cache-memory-bytes", str(CPU_KV_CACHE)]
    return ["--dtype", "float32", "--enforce-eager", *room]


def _healthy(client, port: int) -> bool:
    import httpx

    try:
        return client.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def last_words(log: Path) -> str:
    """The last line of a log that names an error and not just another one, else its last line; its first 300 signs."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if ERROR.search(line) and "See root cause above" not in line]
    line = (errors or lines or ["it said nothing"])[-1]
    found = ERROR.search(line)
    return line[found.start() if found else 0 :][:300]  # without what a logger writes before it
