"""What a profiler does not record of a process: CPU seconds, page faults, context switches, memory, threads,
and where its main thread stood. ``perflab diagnose`` reads it from the report, where it is one entry.

Imports the standard library alone: ``bench/profile/recorders.py`` loads this file by its path into the
interpreter of the program that is profiled.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

KEY = "perflab"
"""The entry's name in a report of torch.profiler."""

SAMPLE_SECONDS = 0.004
MOST_SAMPLES = 8192  # of a long record every second one is dropped, again and again: about 0.5 MB of JSON
MOST_PLACES = 24  # of the main thread that are kept, the most frequent first
COLUMNS = (
    *("time_ns", "user_us", "system_us", "minor_faults", "voluntary_switches", "involuntary_switches"),
    *("resident_kB", "place"),
)
"""Of a sample: time since the record's ``start_ns`` (nanoseconds since 1970), what the process has used since
it started, and where the main thread stood: index into ``places``, -1 for one that is not kept."""
_UNLIMITED = 1 << 60  # bytes: cgroups write a number near 2^63 for "no limit"
_OWN_GROUPS, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_LIBRARIES = ("site-packages", "dist-packages", f"{os.sep}lib{os.sep}python")


class ProcessRecord:
    """``start()``, run, ``stop()``: a dictionary for JSON, each key with its unit at the end.

    Memory in use is what there is when this is made: before the profiler, which takes some for itself.
    """

    def __init__(self) -> None:
        self._samples: list[tuple[Any, ...]] = []
        self._seconds = SAMPLE_SECONDS
        self._changing = threading.Lock()
        self._pages = _Pages()
        self._ended = threading.Event()
        self._watched = threading.main_thread().ident
        self._sampler: threading.Thread | None = None
        self._in_use = _status("VmRSS:") - _free_in_heap()

    def start(self) -> None:
        """Begin to count and to sample."""
        self._sampler = threading.Thread(target=self._sample, name="perflab sampler", daemon=True)
        self._sampler.start()
        self.restart()

    def restart(self) -> None:
        """Count times and faults from here on: what came since ``start`` was warming up."""
        with self._changing:
            self._samples = []
        self._start_ns = time.time_ns()
        self._begin = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)

    def stop(self) -> dict[str, Any]:
        """What happened since ``start`` or ``restart``."""
        began, before = self._begin
        now, after = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
        self._ended.set()
        if self._sampler is not None:
            self._sampler.join(1.0)
        self._pages.close()
        with self._changing:
            samples = self._samples
        stood = Counter(sample[-1] for sample in samples if sample[-1] is not None)
        kept = [place for place, _ in stood.most_common(MOST_PLACES)]
        numbers = {place: number for number, place in enumerate(kept)}
        return {
            "wall_s": now - began,
            "user_s": after.ru_utime - before.ru_utime,
            "system_s": after.ru_stime - before.ru_stime,
            "minor_faults": after.ru_minflt - before.ru_minflt,
            "voluntary_switches": after.ru_nvcsw - before.ru_nvcsw,
            "involuntary_switches": after.ru_nivcsw - before.ru_nivcsw,
            "in_use_at_start_B": max(0, self._in_use),
            "resident_peak_B": _status("VmHWM:"),
            "memory_limit_B": memory_limit(),
            "page_B": resource.getpagesize(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "compute_threads": _compute_threads(),
            "load_average": os.getloadavg()[0],
            "samples": sum(stood.values()),
            "places": [[*place, stood[place]] for place in kept],
            "start_ns": self._start_ns,
            "columns": list(COLUMNS),
            "series": [
                [sample[0] - self._start_ns, *sample[1:-1], numbers.get(sample[-1], -1)] for sample in samples
            ],
        }

    def _sample(self) -> None:
        while not self._ended.wait(self._seconds):
            frame = sys._current_frames().get(self._watched) if self._watched is not None else None
            place = _place(frame) if frame is not None else None
            del frame  # else what the program's functions hold would live on
            used = resource.getrusage(resource.RUSAGE_SELF)
            sample = (
                *(time.time_ns(), round(1e6 * used.ru_utime), round(1e6 * used.ru_stime), used.ru_minflt),
                *(used.ru_nvcsw, used.ru_nivcsw, self._pages.resident_kb(), place),
            )
            with self._changing:
                self._samples.append(sample)
                if len(self._samples) >= MOST_SAMPLES:
                    self._samples = self._samples[::2]
                    self._seconds *= 2


class _Pages:
    """The pages of this process that are in memory, from a file that stays open: it is read often."""

    def __init__(self) -> None:
        self._kb = resource.getpagesize() // 1024
        try:
            self._file = os.open("/proc/self/statm", os.O_RDONLY)
        except OSError:  # no Linux
            self._file = -1

    def resident_kb(self) -> int:
        """0 where the system does not tell."""
        try:
            return int(os.pread(self._file, 64, 0).split()[1]) * self._kb
        except (OSError, IndexError, ValueError):
            return 0

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _place(frame: Any) -> tuple[str, str]:
    """(where the program's own code stood: "function (file:line)", the innermost function)."""
    inner = frame.f_code.co_name
    here = frame
    while here is not None:
        name = here.f_code.co_filename
        if not any(part in name for part in _LIBRARIES) and not name.startswith("<"):
            return f"{here.f_code.co_name} ({os.path.basename(name)}:{here.f_lineno})", inner
        here = here.f_back
    return inner, inner


def memory_limit() -> int:
    """Bytes this process may have: of the machine, its control group and its resource limits the least."""
    limits = []
    with contextlib.suppress(ValueError, OSError, AttributeError):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in _group_limits():
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(path.read_text()))
    for name in ("RLIMIT_RSS", "RLIMIT_DATA", "RLIMIT_AS"):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            limits.append(resource.getrlimit(getattr(resource, name))[0])
    return min((limit for limit in limits if 0 < limit < _UNLIMITED), default=0)


def _group_limits() -> list[Path]:
    """Files that may hold the limit of this process's control group, or of one around it: Slurm and systemd
    give each job a group below the first, in which a container sees itself."""
    found = []
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:  # no Linux
        lines = []
    for line in [*lines, "0::/", "0:memory:/"]:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = (_GROUPS / "memory", "memory.limit_in_bytes") if controllers else (_GROUPS, "memory.max")
        parts = [part for part in group.split("/") if part not in ("", "..")]
        found += [top.joinpath(*parts[:depth], name) for depth in range(len(parts) + 1)]
    return list(dict.fromkeys(found))


class _Heap(ctypes.Structure):
    """glibc's ``struct mallinfo2``: ten numbers (size_t)."""

    _fields_ = [
        ("other", ctypes.c_size_t * 8),
        ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    ]


def _free_in_heap() -> int:
    """Bytes that malloc has, and can hand out without asking the system; 0 where it does not say."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return 0
    mallinfo.restype = _Heap
    return int(mallinfo().fordblks)


def _compute_threads() -> int:
    """Threads among which torch divides an operation; 0 without torch."""
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch is not None else 0


def _status(field: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return 0
