"""glibc's malloc, set while the process runs (mallopt(3)).

``KEEP`` keeps freed memory in the process. ``RETURN`` maps each block of 128 KiB or more by itself and gives it
back at once, as ``MALLOC_MMAP_THRESHOLD_=131072`` does, which is widely recommended against memory that only
grows: every tensor is then page-faulted anew.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4  # malloc.h
_LARGEST = (1 << 31) - 1

KEEP = {_MMAP_MAX: 0, _TRIM_THRESHOLD: _LARGEST, _TOP_PAD: 64 << 20}
RETURN = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 128 << 10, _TRIM_THRESHOLD: 128 << 10, _TOP_PAD: 128 << 10}
USUAL = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20, _TOP_PAD: 128 << 10}
"""Where glibc's own thresholds, which move, end up in a process that has freed large blocks."""


def adjust(setting: dict[int, int]) -> bool:
    """False where this is not glibc, and nothing was changed."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all([bool(mallopt(parameter, value)) for parameter, value in setting.items()])


def missing() -> str:
    """Why the allocator cannot be set here, or an empty string."""
    try:
        ctypes.CDLL(None).gnu_get_libc_version  # noqa: B018 (is it there?)
    except (OSError, AttributeError):
        return "the allocator is not glibc's malloc"
    return ""
