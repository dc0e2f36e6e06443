"""glibc's malloc in a running process: freed memory that goes back to the system.

The lab's column is ``tuned``: its process keeps what is freed, and the fault alone gives it back. A low
threshold for mappings (mallopt(3)) would not do as a fault: malloc maps a block only where its heap has no
room for it, and that of a process that keeps its memory has. Nor could it be undone exactly: what was set
once moves no more by itself.
"""

from __future__ import annotations

import ctypes


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
