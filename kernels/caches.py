"""What the system says of this CPU's caches."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from kernels.cores import affinity, text_of

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def _bytes(text: str) -> int:
    """``32K`` -> 32768."""
    return int(text[:-1]) * UNITS[text[-1]] if text[-1:] in UNITS else int(text)


def caches(cores: Iterable[int] | None = None, root: Path = Path("/")) -> dict[str, float]:
    """``l1d_bytes`` and ``l2_bytes`` of one core; ``l3_bytes`` of all that these cores (None: the usable
    ones) reach. What the system does not say is left out.
    """
    shared: dict[tuple[int, str], int] = {}
    for core in affinity() if cores is None else cores:
        for index in (root / f"sys/devices/system/cpu/cpu{core}/cache").glob("index*"):
            kind, size = text_of(index / "type"), text_of(index / "size")
            level = text_of(index / "level")
            if kind in ("Data", "Unified") and size and level:
                shared[int(level), text_of(index / "shared_cpu_list")] = _bytes(size)
    sizes = {level: [size for (at, _), size in shared.items() if at == level] for level in (1, 2, 3)}
    found: dict[str, float] = {}
    if sizes[1]:
        found["l1d_bytes"] = max(sizes[1])
    if sizes[2]:
        found["l2_bytes"] = max(sizes[2])
    if sizes[3]:
        found["l3_bytes"] = sum(sizes[3])
    return found


@cache
def last_level_bytes(root: Path = Path("/")) -> int:
    """Of all last-level caches that the usable cores reach; 0 where the system does not say."""
    return int(caches(root=root).get("l3_bytes", 0))


@cache
def second_level_bytes(root: Path = Path("/")) -> int:
    """Of one core's second-level cache (the first core that this process may use: there may be hundreds to
    ask); 2 MiB where the system does not say."""
    return int(caches([min(affinity())], root).get("l2_bytes", 0)) or 2 << 20
