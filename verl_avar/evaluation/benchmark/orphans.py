"""Processes that end with the one that started them, however it ends: on Linux. Elsewhere a killed one leaves them."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None  # found before a fork, after which little is safe


def end_with_parent(sign: signal.Signals) -> Callable[[], None] | None:
    """Popen's preexec_fn: the child gets `sign` when the thread that starts it is gone."""
    return None if _libc is None else lambda: _libc.prctl(_PR_SET_PDEATHSIG, sign)
