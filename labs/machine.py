"""A machine as numbers: the constants that formulas need, measured here or taken from a spec sheet.

``Machine`` is only data; ``labs/calibration.py`` measures it. Constants have the unit at the end of
their name. Bandwidth is a curve over the working set, because a server's last-level cache may hold
hundreds of megabytes and "the" memory bandwidth is a different figure at each size.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kernels.cores import affinity, usable_cores
from labs.home import home

FORMAT = 11  # of the cached file; another number is measured anew
MMAP_THRESHOLD_BYTES = 32 * 2**20
"""From here on glibc's malloc maps each block anew, on new pages (mallopt(3), M_MMAP_THRESHOLD: the dynamic
threshold ends at DEFAULT_MMAP_THRESHOLD_MAX, on 64 bits). Smaller ones may come from memory that it keeps."""


@dataclass(frozen=True)
class Curve:
    """Bytes per second over working-set bytes, interpolated linearly in the logarithm of the size."""

    working_set_bytes: Sequence[float]
    bytes_per_second: Sequence[float]

    def at(self, working_set: float) -> float:
        sizes, rates = self.working_set_bytes, self.bytes_per_second
        if working_set <= sizes[0]:
            return rates[0]
        for left in range(len(sizes) - 1):
            if working_set <= sizes[left + 1]:
                width = math.log(sizes[left + 1] / sizes[left])
                part = math.log(working_set / sizes[left]) / width
                return rates[left] * (1 - part) + rates[left + 1] * part
        return rates[-1]


@dataclass(frozen=True)
class Machine:
    """Constants and curves of one machine.

    measured: False for a spec sheet; everything predicted from it is marked *not measured*.
    constants: name with unit -> value. See ``labs/calibration.py`` for what each means and how it
        is measured, and ``labs/machines/*.json`` for sheets.
    sources: name -> where the figure comes from.
    curves: ``copy`` and ``read`` with ``_1`` (one thread) or ``_all`` (all cores) behind.
    gpu: the same kind of data for the first accelerator, or None.
    allocator: the mode the next prediction is for. Under ``default``, glibc hands large blocks
        (``MMAP_THRESHOLD_BYTES`` and more) back to the system at each free, so every call pays page faults
        again.
    """

    name: str
    measured: bool
    constants: Mapping[str, float]
    curves: Mapping[str, Curve] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    gpu: Machine | None = None
    allocator: str = "default"
    measured_at: str = ""

    def __getitem__(self, name: str) -> float:
        if name not in self.constants:
            raise ValueError(
                f"{self.name} has no constant {name!r}; it has {', '.join(sorted(self.constants))}"
            )
        return self.constants[name]

    def get(self, name: str, default: float | None = None) -> float | None:
        return self.constants.get(name, default)

    @property
    def cores(self) -> int:
        return int(self.constants.get("cores", 1))

    def peak(self, dtype: str, *, unit: str = "vector", threads: int = 1) -> float:
        """FLOP/s of ``vector`` FMA or ``matrix`` units; threads=1, or 0 for all cores.

        A machine without matrix units for the dtype computes matrices with its vector units.
        """
        suffix = "1" if threads == 1 else "all"
        for kind in (unit, "vector"):
            value = self.constants.get(f"{kind}_{dtype}_{suffix}_flops")
            if value is not None:
                return value
        raise ValueError(f"{self.name} has no peak for {dtype} ({unit}, threads={threads})")

    def product_rate(
        self, flops: float, dtype: str = "float32", *, threads: int = 1, library: str = "torch"
    ) -> float:
        """FLOP/s of a library's product of two matrices that takes so many FLOPs; threads=1, or 0 for all
        cores.

        Between the square products that were measured (``LIBRARY_product_SIDE_...``), linear in the
        logarithms: small ones reach a small part of the units' peak. The peak where none was measured.
        """
        suffix = "1" if threads == 1 else "all"
        pattern = re.compile(rf"{library}_product_(\d+)_{dtype}_{suffix}_flops")
        found = [
            (int(match[1]), self.constants[name])
            for name in self.constants
            if (match := pattern.fullmatch(name))
        ]
        if not found:
            return self.peak(dtype, unit="matrix", threads=threads)
        sides, rates = zip(*sorted(found), strict=True)
        curve = Curve([2.0 * side**3 for side in sides], [math.log(rate) for rate in rates])
        return math.exp(curve.at(flops))

    def bandwidth(self, working_set: float, *, kind: str = "copy", threads: int = 1) -> float:
        """Bytes per second, read plus written, of a ``copy`` or a ``read`` over this working set."""
        suffix = "1" if threads == 1 else "all"
        name = f"{kind}_{suffix}"
        if name not in self.curves:
            raise ValueError(f"{self.name} has no bandwidth curve {name!r}; it has {', '.join(self.curves)}")
        return self.curves[name].at(working_set)

    def with_allocator(self, allocator: str) -> Machine:
        return replace(self, allocator=allocator)

    def to_json(self) -> dict[str, Any]:
        data = {name: getattr(self, name) for name in ("name", "measured", "allocator", "measured_at")}
        for name in ("constants", "facts", "sources"):
            data[name] = dict(getattr(self, name))
        data["curves"] = {
            name: {
                "working_set_bytes": list(c.working_set_bytes),
                "bytes_per_second": list(c.bytes_per_second),
            }
            for name, c in self.curves.items()
        }
        data["gpu"] = self.gpu.to_json() if self.gpu else None
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Machine:
        content = {key: value for key, value in data.items() if key in cls.__dataclass_fields__}
        content["curves"] = {name: Curve(**curve) for name, curve in data.get("curves", {}).items()}
        content["gpu"] = cls.from_json(data["gpu"]) if data.get("gpu") else None
        return cls(**content)


# --- where machines are kept ---------------------------------------------------------------------


def fingerprint() -> str:
    """A name for this machine: a cached calibration is only good for the same one.

    Which packages and which accelerator were there stands in the file (``labs.calibration.outdated``).
    """
    import hashlib  # loads OpenSSL

    model = ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "flags")):
                model += line
            if line.startswith("flags"):
                break
    except OSError:
        pass
    parts = (
        model or platform.processor(),  # which starts a process
        str(os.cpu_count()),
        str(len(affinity())),
        str(usable_cores()),
        platform.machine(),
        platform.python_version(),
        str(FORMAT),
    )
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:12]


def cache_path() -> Path:
    return home() / f"machine-{fingerprint()}.json"


def load_cached() -> Machine | None:
    """The calibration of this machine, or None when there is none that can be used."""
    try:
        data = json.loads(cache_path().read_text())
        return Machine.from_json(data) if data.get("format") == FORMAT else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def save(machine: Machine) -> Path:
    path = cache_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"format": FORMAT, **machine.to_json()}, indent=1))
    temporary.replace(path)
    return path


def sheet_names() -> list[str]:
    return sorted(path.stem for path in (Path(__file__).parent / "machines").glob("*.json"))


def load_sheet(name: str) -> Machine:
    """A machine that is not at hand, from ``labs/machines/NAME.json``, each figure with its source.

    Every sheet is a GPU's: its constants are the GPU's own and ``gpu`` is None. The curves ``copy_all``
    and ``read_all`` are flat at ``memory_bytes_per_second``, since vendors publish no rate for caches.
    """
    from labs.lab import nearest

    names = sheet_names()
    if name.lower() not in names:
        raise ValueError(f"there is no machine {name!r}{nearest(name.lower(), names)}")
    data = json.loads((Path(__file__).parent / "machines" / f"{name.lower()}.json").read_text())
    figures = data.pop("figures")
    constants = {key: entry["value"] for key, entry in figures.items()}
    sources = {key: entry["source"] for key, entry in figures.items()}
    rate = constants["memory_bytes_per_second"]
    flat = {"working_set_bytes": [1.0], "bytes_per_second": [rate]}
    curves = {"copy_all": flat, "read_all": flat}
    return Machine.from_json(
        {**data, "constants": constants, "sources": sources, "curves": curves, "measured": False}
    )
