"""glibc's malloc, set while the process runs (mallopt(3)): whether freed memory stays in the process."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4  # malloc.h
_LARGEST = (1 << 31) - 1

KEEP = {_MMAP_MAX: 0, _TRIM_THRESHOLD: _LARGEST, _TOP_PAD: 64 << 20}
"""Freed memory stays, whatever its size."""
USUAL = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20, _TOP_PAD: 128 << 10}
"""Where glibc's own thresholds, which move, end up in a process that has freed large blocks."""


def adjust(setting: dict[int, int]) -> bool:
    """False where this is not glibc, and nothing was changed."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all([bool(mallopt(parameter, value)) for parameter, value in setting.items()])


def give_back() -> None:
    """All free memory goes to the system (malloc_trim(3)): what is allocated next is page-faulted anew."""
    ctypes.CDLL(None).malloc_trim(0)


def missing() -> str:
    """Why memory cannot be given back here, or an empty string."""
    try:
        ctypes.CDLL(None).malloc_trim  # noqa: B018 (is it there?)
    except (OSError, AttributeError):
        return "the allocator is not glibc's malloc"
    return ""
