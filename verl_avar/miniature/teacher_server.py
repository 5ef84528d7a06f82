"""The exact teacher's endpoint as a process: `python -m verl_avar.miniature.teacher_server`, or in Python

    with Teacher(faults={"cut": 0.05}, requests_per_minute=6000) as server:
        ...  # an OpenAI client with base_url=server.url; server.stats()

It listens on the loopback only.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import uvicorn

from verl_avar.errors import ConfigError
from verl_avar.miniature import digits, teacher_faults
from verl_avar.miniature.teacher_endpoint import DESCRIPTION, Endpoint, Settings

KEEP_ALIVE_S = 75  # longer than clients keep an idle connection, so that none meets a closed one
PARENT_S = 0.5  # between looks at whether the parent still runs
STOP_S = 10.0


class Teacher:
    """Runs the server while the context is open. It ends with the context, or with this process if that dies.

    faults: probabilities by kind. Other options are the server's flags: requests_per_minute, latency_ms, hold_s,
    slow_s, seed, port, api_key_env (this environment has the key). Raises RuntimeError where it does not start; it
    has said why on stderr.
    """

    def __init__(self, faults: Mapping[str, float] | None = None, **options: Any):
        flags = {"faults": ",".join(f"{kind}={rate}" for kind, rate in (faults or {}).items()), **options}
        self.command = [sys.executable, "-m", "verl_avar.miniature.teacher_server", "--parent", str(os.getpid())]
        self.command += [f"--{name.replace('_', '-')}={value}" for name, value in flags.items() if value is not None]

    def __enter__(self) -> Teacher:
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
        if not (ready := self.process.stdout.readline()):
            raise RuntimeError(f"the exact teacher did not start: exit status {self.process.wait()}")
        self.url = ready.split()[-1]  # http://127.0.0.1:PORT/v1
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def stats(self) -> dict[str, Any]:
        """What was asked and served until now: see `Endpoint.stats`."""
        import httpx

        with httpx.Client(trust_env=False) as client:
            return client.get(f"{self.url.removesuffix('/v1')}/stats").raise_for_status().json()


async def serve(settings: Settings, port: int = 0, port_file: Path | None = None, parent: int | None = None) -> None:
    """Serves on the loopback until SIGTERM or SIGINT, or until `parent` is no longer this process's parent."""
    digits.label(0)  # loads the digits, which would hold up the first request
    listener = socket.create_server(("127.0.0.1", port), backlog=2048)
    config = uvicorn.Config(
        Endpoint(settings).app(),
        log_level="critical",
        lifespan="off",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    port = listener.getsockname()[1]
    if port_file is not None:
        unfinished = port_file.with_name(f".{port_file.name}.{os.getpid()}")
        unfinished.write_text(str(port))
        unfinished.replace(port_file)
    print(f"exact teacher of the miniature's scenes: http://127.0.0.1:{port}/v1", flush=True)
    while not serving.done():
        if parent not in (None, os.getppid()):
            server.should_exit = True
        await asyncio.wait([serving], timeout=PARENT_S)
    await serving


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m verl_avar.miniature.teacher_server", description=DESCRIPTION)
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--port-file", type=Path, help="where to write the port once it listens")
    parser.add_argument("--api-key-env", metavar="NAME", help="environment variable with the key that it asks for")
    kinds = ", ".join((*teacher_faults.TRANSPORT, *teacher_faults.CONTENT))
    parser.add_argument("--faults", default="", metavar="KIND=PROBABILITY,…", help=f"kinds: {kinds}")
    parser.add_argument("--seed", type=int, default=0, help="of the transport faults")
    parser.add_argument("--requests-per-minute", type=float, metavar="R", help="above it: 429")
    parser.add_argument("--latency-ms", type=float, default=0.0, help="of every answer")
    parser.add_argument("--hold-s", type=float, default=30.0, help="how long a timeout lasts")
    parser.add_argument("--slow-s", type=float, default=2.0, help="how late a slow answer is")
    parser.add_argument("--parent", type=int, metavar="PID", help="end when this is no longer the parent's number")
    given = parser.parse_args()
    try:
        faults = teacher_faults.parse(given.faults)
    except ConfigError as error:
        parser.error(str(error))
    if given.requests_per_minute is not None and given.requests_per_minute <= 0:
        parser.error(f"--requests-per-minute must be positive, it is {given.requests_per_minute:g}")
    key = None
    if given.api_key_env is not None and not (key := os.environ.get(given.api_key_env)):
        parser.error(f"--api-key-env: the environment has no {given.api_key_env}")
    pauses = {"latency_s": given.latency_ms / 1000, "hold_s": given.hold_s, "slow_s": given.slow_s}
    settings = Settings(faults, given.seed, given.requests_per_minute, api_key=key, **pauses)
    asyncio.run(serve(settings, given.port, given.port_file, given.parent))


if __name__ == "__main__":
    main()
