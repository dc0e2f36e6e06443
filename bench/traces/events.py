"""One columnar table for every kind of profiler report.

A reader fills an ``Events`` (a NumPy column for each field, a row for each slice of time) and a ``Trace``
around it; breakdown, ranks, diff and page work on the columns and know nothing of formats. Text is kept once
in a symbol table and referred to by code, so a row costs 65 bytes.

Times are whole nanoseconds from ``Trace.origin_ns``: profilers write microseconds since 1970 with decimals,
which a float64 cannot hold to the nanosecond.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, ClassVar

import numpy as np
from msgspec import Struct, field


class Kind(IntEnum):
    """What a slice is, whatever its profiler calls it."""

    OPERATOR = 0  # an operation on the host: aten::add, a JAX or XLA CPU op
    FUNCTION = 1  # a Python (or native) function of a call stack
    RUNTIME = 2  # a call into a driver or runtime: cudaLaunchKernel, hipMemcpyAsync
    SYNCHRONIZATION = 3  # the host waits for a device: cudaDeviceSynchronize, cuda_sync
    KERNEL = 4  # computes on a device
    COPY = 5  # moves bytes on a device: memcpy
    SET = 6  # fills memory on a device: memset
    COMMUNICATION = 7  # a collective or a message: a device kernel (NCCL, DeepEP) or a gloo interval
    ANNOTATION = 8  # a range that the user named
    STEP = 9  # one step of a training loop: ProfilerStep#7
    WAIT = 10  # the host waits for something that is not a device: a lock, a queue, a future, a rank
    UNCLASSIFIED = 11  # none of these: counted, shown, in no sum


DEVICE_KINDS = (Kind.KERNEL, Kind.COPY, Kind.SET)
"""Kinds that only a device has. COMMUNICATION is on a device where its lane is."""


class Lane(Struct, frozen=True):
    """A row of a timeline, in which slices nest: a thread of a process, or a stream of a device.

    process, thread: labels as in the file ("python 1234", "thread 1234 (pt_autograd_0)", "stream 7").
    device: number of the device, -1 on the host.
    """

    process: str
    thread: str
    device: int = -1

    @property
    def on_device(self) -> bool:
        return self.device >= 0


class Events(Struct):
    """Columns of equal length, in order of (lane, start, -duration): a parent stands before its children.

    start, duration: int64 nanoseconds; start from the trace's origin, duration at least 0.
    name: int32, index into ``Trace.names``. kind: int8, a ``Kind``. lane: int32, index into ``Trace.lanes``.
    correlation: int64, equal for a runtime call and what it started on a device; -1 without.
    shape: int32, index into ``Trace.shapes`` (the dimensions of the inputs, as text); -1 without.
    flops: float64 of one slice; 0 where unknown. bytes: int64 that a copy or a collective moves; -1 where
    unknown. A collective's are the larger of what goes in and what comes out on this rank. group: int32,
    index into ``Trace.groups`` (the process group of a collective); -1 without. calls: int64, 1 but where a
    report only has sums (cProfile).
    """

    start: np.ndarray
    duration: np.ndarray
    name: np.ndarray
    kind: np.ndarray
    lane: np.ndarray
    correlation: np.ndarray
    shape: np.ndarray
    flops: np.ndarray
    bytes: np.ndarray
    group: np.ndarray
    calls: np.ndarray

    DTYPES: ClassVar[dict[str, Any]] = {
        "start": np.int64,
        "duration": np.int64,
        "name": np.int32,
        "kind": np.int8,
        "lane": np.int32,
        "correlation": np.int64,
        "shape": np.int32,
        "flops": np.float64,
        "bytes": np.int64,
        "group": np.int32,
        "calls": np.int64,
    }
    MISSING: ClassVar[dict[str, float]] = {
        "correlation": -1,
        "shape": -1,
        "flops": 0.0,
        "bytes": -1,
        "group": -1,
        "calls": 1,
    }

    def __len__(self) -> int:
        return len(self.start)

    @property
    def end(self) -> np.ndarray:
        return self.start + self.duration

    def select(self, rows: np.ndarray) -> Events:
        """The rows of a boolean mask or of indices."""
        return Events(**{column: getattr(self, column)[rows] for column in self.DTYPES})

    @classmethod
    def of(cls, **columns: np.ndarray | Sequence[float]) -> Events:
        """From columns in any order of rows: fills those left out (``MISSING``), converts, sorts.

        ValueError: unequal lengths, an unknown or an indispensable column left out, a negative duration.
        """
        if unknown := set(columns) - set(cls.DTYPES):
            raise ValueError(f"no such columns: {', '.join(sorted(unknown))}")
        if missing := set(cls.DTYPES) - set(cls.MISSING) - set(columns):
            raise ValueError(f"columns left out: {', '.join(sorted(missing))}")
        given = {name: np.asarray(values, cls.DTYPES[name]) for name, values in columns.items()}
        lengths = {name: len(values) for name, values in given.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"columns of unequal lengths: {lengths}")
        count = len(given["start"])
        for name, value in cls.MISSING.items():
            given.setdefault(name, np.full(count, value, cls.DTYPES[name]))
        if count and given["duration"].min() < 0:
            raise ValueError("a duration is negative: readers drop such slices and count them")
        order = _order(given["lane"], given["start"], given["duration"])
        return cls(**{name: values[order] for name, values in given.items()})


def distinct(values: np.ndarray) -> np.ndarray:
    """Each value once, sorted: np.unique, which however imports numpy.ma (10 ms) when it is first called."""
    ordered = np.sort(values, axis=None)
    return ordered[np.append(True, ordered[1:] != ordered[:-1])] if len(ordered) else ordered


def _order(lane: np.ndarray, start: np.ndarray, duration: np.ndarray) -> np.ndarray:
    """What np.lexsort((-duration, start, lane)) gives, sooner: lane and start are sorted as one integer where
    they fit into one, and durations are looked at only where both are equal."""
    if not len(start):
        return np.empty(0, np.int64)
    first = int(start.min())
    bits = (int(start.max()) - first).bit_length()
    if lane.min() < 0 or bits + int(lane.max()).bit_length() > 62:
        return np.lexsort((-duration, start, lane))
    place = lane.astype(np.int64) << bits | (start - first)
    order = np.argsort(place, kind="stable")
    equal = np.diff(place[order]) == 0
    tied = np.flatnonzero(np.append(False, equal) | np.append(equal, False))
    if len(tied):
        rows = order[tied]
        order[tied] = rows[np.lexsort((-duration[rows], place[rows]))]
    return order


class Memory(Struct, frozen=True):
    """Allocated bytes over time, as the profiler sampled them (empty without): one row a sample.

    time: int64 nanoseconds from the trace's origin. allocated: int64 bytes in use after the sample.
    device: int32 number, -1 the host.
    """

    time: np.ndarray
    allocated: np.ndarray
    device: np.ndarray

    @classmethod
    def empty(cls) -> Memory:
        return cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int32))


class Trace(Struct):
    """One report: of one process, or of one rank of a job.

    source: the path as the user gave it. format: kineto, jax, nsys, cprofile, speedscope, viztracer, py-spy,
    chrome (a plain Chrome trace).
    timed: False where slices have a length but no place in time (cProfile): only tables make sense of them.
    nested: False where lengths are what each function spent itself (cProfile): no slice encloses another.
    unit: what lengths are counted in where that is no time ("bytes"), which is never ``timed``; else "".
    origin_ns: nanoseconds since 1970 of time 0, or 0 where the file does not say: of two ranks it may be
    compared only where both know it. rank, world_size: -1 where the file does not say; of
    several files one without a rank is given one, which is then made up. backend: gloo, nccl.
    dropped: what was left out of ``events`` and why, counted: {"slices without a duration": 3}. Nothing is
    left out uncounted.
    unclassified: categories (or names) of the slices of Kind.UNCLASSIFIED, counted.
    notes: what else a reader should know, as sentences.
    facts: what the file says of its machine: {"device": "NVIDIA H100", ...}.
    process: what our recorder counted of the process beside the profiler (``bench/profile/process.py``).
    product_ns: nanoseconds of products of matrices and attention by the type of their first input.
    """

    source: str
    format: str
    events: Events
    names: list[str]
    lanes: list[Lane]
    shapes: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory.empty)
    timed: bool = True
    nested: bool = True
    unit: str = ""
    origin_ns: int = 0
    rank: int = -1
    rank_made_up: bool = False
    world_size: int = -1
    backend: str = ""
    dropped: Counter[str] = field(default_factory=Counter)
    unclassified: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    process: dict[str, Any] = field(default_factory=dict)
    product_ns: dict[str, int] = field(default_factory=dict)

    def on_device(self) -> np.ndarray:
        """bool (rows,): the slice lies on a stream of a device."""
        devices = np.array([lane.on_device for lane in self.lanes], bool)
        return devices[self.events.lane] if len(self.lanes) else np.zeros(len(self.events), bool)


class Job(Struct):
    """All that was read from one path: a file is a job of one trace, a folder one of several ranks.

    traces: in order of their rank; two of the same rank both stay, and ``notes`` says so. failures: (path,
    what is wrong with it) of files that could not be read; the others are still reported. notes: what was
    chosen or left out in a folder, as sentences.
    """

    source: str
    traces: list[Trace]
    failures: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
