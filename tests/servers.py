"""Real vLLM servers for tests: started as a person starts them, known by their processes, files and metrics."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

MODEL = "miniature"
START_S, STOP_S = 300, 60
SHARED = Path("/dev/shm")
ROOT = Path(__file__).resolve().parents[1]
KINDS = {"core": "VLLM::EngineCore", "worker": "VLLM::Worker"}  # by their process titles


def free_port() -> int:
    """A port of the loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """An OpenAI server on the CPU, in a session of its own, which is how its processes are told from others'.

    folder: where its log and its sockets go. config: its `kv_transfer_config`, None for stock vLLM. It starts in the
    background: `wait` until it answers. As a context manager it ends with all its processes, whatever happened, and
    removes the shared files that were left (look at `left_files` before).
    """

    def __init__(self, checkpoint: Path, folder: Path, *flags: str, config: dict | None = None, port: int = 0):
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
        command += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", "{port}"]
        command += ["--dtype", "float32", "--enforce-eager", "--disable-uvicorn-access-log", *flags]
        if config is not None:
            command += ["--kv-transfer-config", json.dumps(config)]
        self._start(command, folder, port)

    def _start(self, command: list[str], folder: Path, port: int = 0) -> None:
        """{port} in the command: a free one, unless it is given."""
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command, self._folder = [word.replace("{port}", str(self.port)) for word in command], folder
        self._files: set[str] = set()
        self._launch()

    def _launch(self) -> None:
        self.log = self._folder / f"server-{self.port}-{time.monotonic_ns()}.log"
        # vLLM leaves its sockets where they are, even after a clean exit.
        environment = os.environ | {"VLLM_RPC_BASE_PATH": str(self._folder)}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def start_again(self) -> Server:
        """On its port, once `kill` has ended all its processes, which leaves files that none of them can remove."""
        assert not self.processes()
        for path in self.left_files():
            path.unlink()
        self._launch()
        return self

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_) -> None:
        self.kill(*self.processes())
        for path in self.left_files():
            path.unlink()

    def wait(self) -> Server:
        """Until it answers. Raises RuntimeError, with the end of its log, if it ends or takes longer than START_S."""
        end = time.monotonic() + START_S
        while time.monotonic() < end and self._process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    self.look()
                    return self
            except httpx.TransportError:
                time.sleep(0.2)
        raise RuntimeError(f"the server did not start:\n{self.log_end()}")

    def log_end(self, characters: int = 6000) -> str:
        return self.log.read_text(errors="replace")[-characters:]

    def processes(self) -> list[psutil.Process]:
        """Those that run, orphans included."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self._process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):  # ended meanwhile
                continue
        return found

    def process(self, kind: str) -> psutil.Process:
        """The server itself ("api"), its engine core ("core") or its only worker ("worker")."""
        if kind == "api":
            return psutil.Process(self._process.pid)
        (found,) = (process for process in self.processes() if KINDS[kind] in " ".join(process.cmdline()))
        return found

    def look(self) -> set[str]:
        """Names in the shared-memory folder that are this server's, as far as seen until now, gone or not: what its
        processes map, and loky's semaphores, which carry their process's number."""
        for process in self.processes():
            self._files |= {path.name for path in SHARED.glob(f"sem.loky-{process.pid}-*")}
            try:
                maps = Path(f"/proc/{process.pid}/maps").read_text()
            except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
                continue
            self._files |= set(re.findall(rf"{SHARED}/(\S+)", maps))
        return self._files

    def left_files(self) -> list[Path]:
        """Its shared files that exist now."""
        return [SHARED / name for name in sorted(self._files) if (SHARED / name).exists()]

    def kill(self, *processes: psutil.Process) -> None:
        """Ends processes at once (SIGKILL)."""
        self.look()
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        for process in processes:
            self._await_end([process])

    def stop(self) -> int:
        """Asks it to end (SIGTERM) and returns its exit status once all its processes have."""
        self.look()
        self._process.send_signal(signal.SIGTERM)
        self.await_end()
        return self._process.returncode

    def await_end(self) -> None:
        """Until none of its processes runs. Raises TimeoutError."""
        self._await_end(None)

    def _await_end(self, processes: list[psutil.Process] | None) -> None:
        end = time.monotonic() + STOP_S
        while True:
            self._process.poll()  # or it stays a zombie
            running = self.processes()
            left = running if processes is None else [process for process in processes if process in running]
            if not left:
                return
            if time.monotonic() > end:
                raise TimeoutError(f"still running after {STOP_S} s: {left}\n{self.log_end()}")
            time.sleep(0.1)

    def metrics(self) -> dict[str, float]:
        """Values of /metrics by sample name, added up over the labels; a label is kept for "le" (buckets) and
        "finished_reason", as in `vllm:request_success_total/abort`."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).raise_for_status().text
        values: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                kept = [sample.labels[key] for key in ("le", "finished_reason") if key in sample.labels]
                name = "/".join((sample.name, *kept))
                values[name] = values.get(name, 0.0) + sample.value
        return values


class AvarServer(Server):
    """The same by `avar serve`."""

    def __init__(self, checkpoint: Path, folder: Path, *flags: str):
        command = [sys.executable, "-m", "verl_avar.cli", "serve", str(checkpoint), "--served-model-name", MODEL]
        command += ["--host", "127.0.0.1", "--port", "{port}", "--dtype", "float32", "--enforce-eager"]
        self._start([*command, "--disable-uvicorn-access-log", *flags], folder)
