"""Facts about where a measurement is taken, and what may spoil it."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the doctor looks for foreign packages called labs: importing it here would find them
    from labs.lab import Allocator

GIB = 1 << 30
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "OPENBLAS_THREAD_TIMEOUT",
)
OPENBLAS_SPIN = 20
"""NumPy's OpenBLAS lets its idle threads spin for 2**26 ticks, some 25 ms, in which they take a core from
whatever variant comes next: a parallel region of 0.3 ms took 3.6 ms beside them. 2**20 are 0.4 ms, no longer
than other libraries' threads wait."""
PACKAGES = ("torch", "numpy", "numba", "jax", "jaxlib", "triton", "ray", "pytest", "pytest-benchmark")
OURS = ("kernels", "parallel", "labs", "bench")


def allocator_environment(column: str) -> dict[str, str]:
    """Environment that fixes glibc malloc's mode for a child process.

    ``tuned`` keeps freed memory inside the process, so that a large output is not page-faulted anew at
    every call (glibc manual, "Memory Allocation Tunables"). The mode is fixed when a process starts. Without
    the cache of small pieces each thread keeps: aligning a tensor cuts such pieces off, and one that lies in
    the cache parts two freed tensors for ever, so that the next of their size gets new pages after all.
    """
    if column == "default":
        return {"GLIBC_TUNABLES": ""}
    if column == "tuned":
        return {
            "GLIBC_TUNABLES": f"glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={64 * GIB}"
            f":glibc.malloc.top_pad={256 << 20}:glibc.malloc.tcache_count=0"
        }
    raise ValueError(f"there is no allocator mode {column!r}; there is default, tuned")


def allocator_mode() -> Allocator:
    """The mode of this process."""
    return "tuned" if "glibc.malloc.mmap_max=0" in os.environ.get("GLIBC_TUNABLES", "") else "default"


def read_text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def governor() -> str:
    return read_text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def load_average() -> float:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine_facts() -> dict[str, Any]:
    """What goes into ``machine_info`` beside pytest-benchmark's own entries."""
    from labs.machine import fingerprint, usable_cores

    return {
        "fingerprint": fingerprint(),
        "usable_cores": usable_cores(),
        "governor": governor() or "unknown",
        "transparent_huge_pages": read_text("/sys/kernel/mm/transparent_hugepage/enabled") or "unknown",
        "allocator": allocator_mode(),
        "load_average_1_min": load_average(),
        "thread_environment": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        "versions": versions(),
    }


def foreign_packages() -> list[str]:
    """Other installed distributions that own a package named like one of ours, one line each."""
    lines = []
    for name, owners in metadata.packages_distributions().items():
        foreign = sorted(set(owners) - {"perflab"})
        if name in OURS and foreign:
            lines.append(f"the distribution {', '.join(foreign)} also owns a package named {name!r}")
    return lines


def names_taken(folder: Path) -> list[str]:
    """Modules in a folder that ``python -m`` and torchrun there would import for ours, one line each."""
    here = Path(__file__).resolve().parent.parent
    found = []
    for name in OURS:
        for path in (folder / f"{name}.py", folder / name / "__init__.py"):
            if path.exists() and not path.resolve().is_relative_to(here / name):
                found.append(f"python -m and torchrun would import {path} as perflab's {name!r}; rename it")
    return found


def shadowed_packages() -> list[str]:
    """Packages of ours that Python would import from somewhere else, one line each."""
    import importlib.util

    here = Path(__file__).resolve().parent.parent
    lines = []
    for name in OURS:
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve().parent.parent if spec and spec.origin else None
        if origin != here:
            lines.append(f"'import {name}' finds {origin or 'nothing'}, not perflab's own")
    return lines


def measuring_environment(column: str, device: str) -> dict[str, str]:
    """Variables of a child that measures under an allocator mode: this process's, without what disturbs."""
    environment = {**os.environ, **allocator_environment(column)}
    environment["PYTHONUNBUFFERED"] = "1"
    environment.setdefault("OPENBLAS_THREAD_TIMEOUT", str(OPENBLAS_SPIN))
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # other plugins would import, slow down, or interfere
    for name in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS"):
        environment.pop(name, None)
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment
