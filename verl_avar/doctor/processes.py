"""Runs the probes as processes of their own and turns what they say, or fail to say, into findings."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from verl_avar.doctor.environment import BOOTSTRAP, Finding

POINTER = "See root cause above"  # vLLM's last exception only points at the one of its engine process
RESULT = "avar-doctor-result "  # marks the one line of a probe's output that is meant for us
SECONDS = {"torchvision": 120, "driver": 180, "ray": 240, "vllm": 300}
PLUGIN_FIX = "pip install --no-deps -e . at the repository root; unset VERL_USE_EXTERNAL_PLUGINS or let it name avar"
FIXES = {
    "torchvision": "{bootstrap}: it writes avar_torchvision.pth, which defines the missing op schemas in every process",
    "driver": PLUGIN_FIX,
    "ray": PLUGIN_FIX + "; if Ray itself did not start, see the log",
    "vllm": "see the log; unset VLLM_PLUGINS or let it name avar; {bootstrap} restores the tested versions",
}
NAMES = {
    "torchvision": "torchvision imports",
    "driver": "plugin in the driver",
    "ray": "plugin in a Ray worker",
    "vllm": "plugin in a vLLM engine",
}


def library_probes(stack: str) -> Iterator[Finding]:
    """Importing torchvision, and verl in a driver process."""
    yield probe("torchvision", stack)
    yield probe("driver", stack)


def engine_probes(stack: str) -> Iterator[Finding]:
    """A Ray worker and a vLLM engine, each started, asked and shut down."""
    yield probe("ray", stack)
    yield probe("vllm", stack)


def probe(name: str, stack: str, command: list[str] | None = None, seconds: float | None = None) -> Finding:
    """Runs one probe of probes.py in a process group of its own, which is gone when this returns.

    command and seconds stand in for the probe's own (tests).
    """
    seconds = seconds or SECONDS[name]
    fix = FIXES[name].format(bootstrap=BOOTSTRAP[stack])
    command = command or [sys.executable, "-m", "verl_avar.doctor.probes", name, stack]
    with tempfile.NamedTemporaryFile("w+", prefix=f"avar-doctor-{name}-", suffix=".log", delete=False) as log:
        # A session of its own, so that an engine's processes can be ended together, by its id.
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(seconds)
            ending = f"ended with exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            ending = f"did not end within {seconds:g} s"
        finally:
            _end(process)
        log.seek(0)
        output = log.read()
    result = next((line for line in reversed(output.splitlines()) if line.startswith(RESULT)), None)
    if result is not None:
        answer = json.loads(result.removeprefix(RESULT))
        if answer["ok"]:
            Path(log.name).unlink()
            return Finding(NAMES[name], True, answer["detail"])
        ending = last_error(output) if POINTER in answer["detail"] else answer["detail"]
    else:
        ending += f": {last_error(output)}"
    return Finding(NAMES[name], False, ending, fix, Path(log.name))


def last_error(output: str) -> str:
    """The line of a process's output that most likely says what went wrong: its last exception, or its last line."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in output.splitlines() if line.strip()]
    raised = [line for line in lines if re.search(r"\b[\w.]*(Error|Exception)\b\s*:", line) and POINTER not in line]
    return (raised or lines or ["it printed nothing"])[-1][:300]


def _end(process: subprocess.Popen) -> None:
    """Ends the probe and what it started; what has ended already is no error."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
