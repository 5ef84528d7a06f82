"""The Python files of a released wheel, which is neither installed nor imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile


def python_files(requirement: str, folder: Path) -> Path:
    """Downloads the wheel that pip finds for `requirement` (name==version), keeps its .py files only and returns the
    folder that they lie in, packages at the top. Raises RuntimeError with pip's own words where there is none."""
    wheels, files = folder / "wheels", folder / "files"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", wheels, requirement], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip did not download {requirement}: {done.stderr.strip().splitlines()[-1]}")
    (wheel,) = wheels.glob("*.whl")
    with ZipFile(wheel) as archive:
        archive.extractall(files, [name for name in archive.namelist() if name.endswith(".py")])
    wheel.unlink()
    return files
