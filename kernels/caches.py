"""What the system says of this CPU's caches."""

from __future__ import annotations

import os
from functools import cache


@cache
def second_level_bytes() -> int:
    """Of one core's second-level cache; 2 MiB where the system does not say."""
    try:
        found = os.sysconf("SC_LEVEL2_CACHE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on every system
        found = 0
    return found if found > 0 else 2 << 20


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
