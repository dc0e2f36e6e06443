"""Cores that this process may use: what the affinity names, and no more than a container's quota pays for."""

from __future__ import annotations

import math
import os
from pathlib import Path


def text_of(path: str | Path) -> str:
    """What a file of the system says; nothing where there is none."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _quota(folder: Path) -> float | None:
    """Of one control group, in cores; version 2 has one file, version 1 two."""
    quota, _, period = text_of(folder / "cpu.max").partition(" ")
    if not quota:
        quota, period = (text_of(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    limited = quota.isdigit() and period.isdigit() and int(period) > 0  # else "max", or -1
    return int(quota) / int(period) if limited else None


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that control groups leave this process, or None when none limits it.

    A limit holds for all groups below, so that the least on the way from this process's group up counts.
    Inside a container that way may be the host's, of which only the end is visible.
    """
    found = []
    for line in text_of(root / "proc/self/cgroup").splitlines():
        _, kinds, path = line.split(":", 2)
        mounts = ["sys/fs/cgroup"] if not kinds else [f"sys/fs/cgroup/{kinds}", "sys/fs/cgroup/cpu"]
        if kinds and "cpu" not in kinds.split(","):
            continue
        for mount in mounts:
            group = Path(path.lstrip("/"))
            found += [_quota(root / mount / each) for each in (group, *group.parents)]
    return min((quota for quota in found if quota is not None), default=None)


def usable_cores() -> int:
    """Cores this process may keep busy: taskset's share or a container's, not the host's count."""
    quota = cpu_quota()
    return len(affinity()) if quota is None else max(1, min(len(affinity()), math.ceil(quota)))
