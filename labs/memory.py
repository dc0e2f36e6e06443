"""Memory of this process as Linux sees it: pages that are there, and the most there were."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable
from pathlib import Path


def reset_peak_bytes() -> bool:
    """Start counting the peak anew (proc(5), clear_refs); False where that is not possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return True
    except OSError:
        return False


def resident_bytes() -> int:
    """Bytes of this process that are in memory; 0 where Linux does not tell."""
    return _status("VmRSS:")


class _Heap(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [
        ("other", ctypes.c_size_t * 8),
        ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    ]


def in_use_bytes() -> int:
    """Bytes in memory but for those that malloc keeps free."""
    free = 0
    with contextlib.suppress(OSError, AttributeError):
        mallinfo = ctypes.CDLL(None).mallinfo2
        mallinfo.restype = _Heap
        free = int(mallinfo().fordblks)
    return max(0, resident_bytes() - free)


def peak_bytes() -> int:
    """The most bytes that were in memory since ``reset_peak_bytes``, or since start."""
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM:") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def extra_bytes(step: Callable[[], object]) -> int | None:
    """By how much a call grows the memory in use at most; None where that cannot be known.

    One call goes before, which may compile or allocate what stays; what malloc keeps of it is given back.
    """
    step()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc's
    if not reset_peak_bytes():
        return None
    before = resident_bytes()
    step()
    return max(0, peak_bytes() - before)


def _status(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)
