"""The benchmarks' code paths, at sizes where they take a moment; they fail where compared numbers differ."""

import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads memory from /proc")
def test_role_mass(capsys):
    module = runpy.run_path(str(BENCHMARKS / "role_mass.py"))
    module["main"](["--lengths", "64", "--kv-heads", "2", "--threads", "1", "--repeats", "1"])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 5 and rows[2].startswith("| 64 | role_mass | maps | ") and "–" not in rows[2]
    figures = {"forward": 1.0, "both": 2.0, "mb": 3.0}
    rows = module["table"]([8192], [{name: figures for name in ("role_mass", "avar_sdpa", "sdpa")}]).splitlines()
    assert rows[2].endswith("| 1 s / – | 2 s / – | 3 MB / – |") and rows[4].endswith("3 / 3 MB = 1.00× |")
