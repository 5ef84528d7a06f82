"""Starts a harness in its own environment: its output in a log, its keys and addresses ours, no orphan left behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil

from verl_avar.evaluation.benchmark.harness.proxy import JUDGE_ROUTE
from verl_avar.evaluation.benchmark.harness.settings import HarnessSettings
from verl_avar.evaluation.benchmark.orphans import end_with_parent

STOP_S = 20
# Of this process's environment; another Python's modules, and keys that a harness could send anywhere.
DROPPED = re.compile(r"PYTHON(PATH|HOME)|VIRTUAL_ENV|.*_API_(KEY|BASE|URL)|OPENAI_.*|AZURE_.*|LOCAL_LLM|MODEL_VERSION")
TELLING = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception)\b|\berror\b|\bERROR\b")


class HarnessFailed(RuntimeError):
    """The harness ended without what it was to write; one line that says where to look."""


def environment(settings: HarnessSettings, proxy: str) -> dict[str, str]:
    """Variables of the harness's process. proxy: http://127.0.0.1:PORT.

    OpenAI's address is the proxy's judge everywhere, so that a scorer that asks one by itself gets the named judge or
    is refused, and asks nobody else. HF_HUB_OFFLINE counts for data sets, too.
    """
    judge = f"{proxy}{JUDGE_ROUTE}"
    kept = {name: value for name, value in os.environ.items() if not DROPPED.fullmatch(name)}
    ours = {
        "OPENAI_API_KEY": "none",
        "OPENAI_API_BASE": judge,
        "OPENAI_BASE_URL": judge,
        "OPENAI_API_URL": f"{judge}/chat/completions",
        "MODEL_VERSION": settings.judge.model if settings.judge else "none",  # lmms-eval's name of its judge
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "WANDB_MODE": "disabled",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    if kept.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        ours |= {"HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return kept | ours


def launch(command: list[str], variables: dict[str, str], log: Path, folder: Path) -> None:
    """Runs a harness in `folder`, its output appended to `log` as it comes. Raises HarnessFailed.

    It has a session of its own, which ends with it or with an exception here; and it ends with this process (Linux), or
    a killed run would go on writing where the next one reads.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"\n$ {' '.join(command)}\n".encode())
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=variables,
            cwd=folder,
            start_new_session=True,
            preexec_fn=end_with_parent(signal.SIGKILL),
        )
        try:
            status = process.wait()
        finally:
            end_session(process)
    if status:
        raise HarnessFailed(f"the harness ended with status {status}: {last_error(log, start)} (all of it: {log})")


def end_session(process: subprocess.Popen) -> None:
    """Ends a process and those it started, and returns when they have."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        for one in members(process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):  # ended meanwhile
                one.send_signal(sign)
        end = time.monotonic() + STOP_S
        while process.poll() is None or members(process.pid):
            if time.monotonic() > end:
                break
            time.sleep(0.05)


def members(session: int) -> list[psutil.Process]:
    """The processes of a session that run."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):  # ended meanwhile
            continue
    return found


def last_error(log: Path, start: int = 0) -> str:
    """The last line of a log, from a byte on, that looks like an error; else the last line; at most 300 characters."""
    with log.open("rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if TELLING.search(line)]
    return (telling or lines or ["it wrote nothing"])[-1][:300]
