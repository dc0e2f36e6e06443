"""What the system says about the machine: caches, memory, modes that change measurements, versions.

Used by ``labs.calibration``. Nothing is measured here. What cannot be read is left out.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from typing import Any

from kernels.caches import caches as caches
from kernels.cores import cpu_quota, text_of, usable_cores

PACKAGES = ("torch", "numpy", "numba", "llvmlite", "jax", "jaxlib", "triton", "ray")


def _cpu_list(text: str) -> set[int]:
    """``0-3,8`` -> {0, 1, 2, 3, 8}."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def memory_bytes() -> float:
    """Memory this process may use: the machine's, or its container's share."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = text_of(path)
        if limit.isdigit():
            total = min(total, float(limit))
    return total


def _cpu_lines(key: str) -> Iterator[str]:
    for line in text_of("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            yield value.strip()


def model_name() -> str:
    return next(_cpu_lines("model name"), "") or platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def facts() -> dict[str, Any]:
    """Names and modes to show beside every result; values are text, numbers or lists."""
    from kernels import peaks as kernel
    from kernels.amx import amx_unavailable

    interesting = (
        "avx",
        "avx2",
        "fma",
        "avx512f",
        "avx512bf16",
        "avx512vnni",
        "amx-tile",
        "amx-bf16",
        "neon",
        "sve",
    )
    found: dict[str, Any] = {
        "model": model_name(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "usable_cores": usable_cores(),
        "host_cores": os.cpu_count(),
        "features": [name for name in interesting if kernel.FEATURES.get(name)],
        "amx": amx_unavailable() or "usable",
        "versions": versions(),
    }
    modes = {
        "governor": "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor",
        "transparent_huge_pages": "/sys/kernel/mm/transparent_hugepage/enabled",
        "simultaneous_multithreading": "/sys/devices/system/cpu/smt/active",
    }
    for name, path in modes.items():
        if text := text_of(path):
            found[name] = text
    if quota := cpu_quota():
        found["cpu_quota_cores"] = quota
    if hasattr(os, "getloadavg"):
        found["load_average"] = round(os.getloadavg()[0], 2)
    return found
