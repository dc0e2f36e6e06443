"""What a host thread was doing, as causes of waiting, and a ledger that charges time to them."""

from __future__ import annotations

import re
from collections import defaultdict
from enum import StrEnum

import numpy as np
from msgspec import Struct

from bench.traces.breakdown import lane_rows
from bench.traces.classify import is_communication_call
from bench.traces.events import Kind, Trace
from bench.traces.intervals import Intervals, covered, subtract
from bench.traces.steps import steps
from bench.traces.tree import Segments, innermost

LONG_CALL_NS = 100_000
"""A runtime call inside an operator that takes longer (cudaMalloc, cudaFree) is named itself."""

_INPUT = re.compile(r"data_?loader|load_batch|wait_for_batch|next_batch|fetch_?batch", re.IGNORECASE)


# A function with its file as PyTorch, JAX, and all others write it: "a/b.py(12): load", "$b.py:12 load",
# "load (a/b.py:12)".
_PLACED = re.compile(r".*\(\d+\): (.*)|\$\S*:\d+ (.*)|(.*) \(.*:[\d.e+]+\)")
_TORCHS_OWN = "torch/utils/data/dataloader.py"


def is_input(name: str) -> bool:
    """Whether a slice of this name waits for, or makes, the next batch: an operation or a function so called,
    or one of torch's own loader. In what file a function of the program stands says nothing."""
    placed = _PLACED.fullmatch(name)
    if placed is not None:
        if _TORCHS_OWN in name:
            return True
        name = next(group for group in placed.groups() if group is not None)
    return _INPUT.search(name) is not None


def input_rows(trace: Trace) -> np.ndarray:
    """bool (rows,): slices in which the next batch is waited for, or made. What encloses a whole step is
    none, however it is called."""
    events = trace.events
    found = np.array([is_input(name) for name in trace.names] or [False], bool)[events.name]
    marked = steps(trace)
    if marked.given and found.any():
        rows = np.flatnonzero(found)
        first = np.searchsorted(marked.start, events.start[rows], "left")
        ends = np.append(marked.end, np.iinfo(np.int64).max)[first]
        found[rows] = ends > events.end[rows]
    return found


class Cause(StrEnum):
    """What was waited for."""

    OPERATOR = "the host was in an operator"
    PYTHON = "the host was in Python"
    RUNTIME = "the host was in a runtime call"
    DEVICE = "the host had waited for the device"
    INPUT = "the host waited for input"
    WAIT = "the host waited"
    DISTRIBUTED = "the host was in a communication call"
    BETWEEN = "the host was between operators"
    LATENCY = "launch latency"
    COMMUNICATION = "communication on another stream"
    STREAM = "a kernel on another stream"
    UNKNOWN = "unknown"


_CAUSES = list(Cause)


class Reason(Struct, frozen=True):
    """Nanoseconds that one cause explains, what was under way (a name in the report), in how many pieces."""

    cause: Cause
    name: str
    time: int
    pieces: int

    def text(self) -> str:
        """The cause and the name, as a clause."""
        if not self.name:
            return str(self.cause)
        return f"{self.cause}{', in ' if self.cause is Cause.BETWEEN else ': '}{self.name}"


class Ledger:
    """Time charged to causes. parents: of ``bench.traces.tree``."""

    def __init__(self, trace: Trace, parents: np.ndarray) -> None:
        self.trace = trace
        self.parents = parents
        self._times: dict[tuple[Cause, str], int] = defaultdict(int)
        self._pieces: dict[tuple[Cause, str], int] = defaultdict(int)
        self._calls = np.append([is_communication_call(name) for name in trace.names], False).astype(bool)
        self._loads = input_rows(trace)
        self._bounds = lane_rows(trace)
        self._segments: dict[int, Segments] = {}

    def charge(self, cause: Cause, name: str, time: int, pieces: int = 1) -> None:
        """Adds nanoseconds; none are no entry."""
        if time:
            self._times[cause, name] += time
            self._pieces[cause, name] += pieces

    def reasons(self) -> list[Reason]:
        """All that was charged, the longest first."""
        found = [Reason(*key, time, self._pieces[key]) for key, time in self._times.items()]
        return sorted(found, key=lambda reason: (-reason.time, reason.cause, reason.name))

    def charge_thread(self, lane: int, time: Intervals) -> Intervals:
        """Charges the time to what is innermost on this thread (-1: none) then; returns when nothing is."""
        if lane < 0:
            return time
        if lane not in self._segments:
            self._segments[lane] = innermost(self.trace.events, self.parents, *self._bounds[lane])
        pieces = self._segments[lane]
        lengths = covered(time, pieces.start, pieces.end)
        met = np.flatnonzero(lengths)
        causes, own, within = self._causes(pieces.row[met])
        # One number for cause, own name and the name around it: each may be absent, which is 0.
        base = len(self.trace.names) + 1
        keys, which = np.unique((causes * base + own + 1) * base + within + 1, return_inverse=True)
        sums = np.zeros(len(keys), np.int64)
        np.add.at(sums, which, lengths[met])
        counts = np.bincount(which, minlength=len(keys)).tolist()
        for key, length, count in zip(keys.tolist(), sums.tolist(), counts, strict=True):
            names = (key // base % base, key % base)
            label = " in ".join(self.trace.names[name - 1] for name in names if name)
            self.charge(_CAUSES[key // base**2], label, length, count)
        return subtract(time, Intervals(pieces.start, pieces.end))

    def _causes(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Three int64 columns: place in ``Cause``, code of the own name, code of the name around it or -1."""
        events = self.trace.events
        operator, loader = self._around(rows)
        name, kind = events.name[rows].astype(np.int64), events.kind[rows]
        within = np.where(operator >= 0, events.name[operator], -1).astype(np.int64)
        alone = operator < 0
        long_call = (kind == Kind.RUNTIME) & ((events.duration[rows] > LONG_CALL_NS) | alone)
        annotated = (kind == Kind.ANNOTATION) | (kind == Kind.STEP)
        # The first that applies decides: condition, cause, own name, name around it.
        rules = (
            (loader >= 0, Cause.INPUT, events.name[loader], -1),
            (kind == Kind.WAIT, Cause.WAIT, name, within),
            (kind == Kind.SYNCHRONIZATION, Cause.DEVICE, name, within),
            (long_call, Cause.RUNTIME, name, within),
            (kind == Kind.COMMUNICATION, Cause.DISTRIBUTED, name, -1),
            (self._calls[within], Cause.DISTRIBUTED, within, -1),
            (~alone, Cause.OPERATOR, within, -1),
            (kind == Kind.FUNCTION, Cause.PYTHON, name, -1),
            (annotated, Cause.BETWEEN, np.where(kind == Kind.STEP, -1, name), -1),
        )
        conditions = [rule[0] for rule in rules]
        places = [_CAUSES.index(rule[1]) for rule in rules]
        causes = np.select(conditions, places, _CAUSES.index(Cause.UNKNOWN))
        own = np.select(conditions, [np.broadcast_to(rule[2], rows.shape) for rule in rules], name)
        around = np.select(conditions, [np.broadcast_to(rule[3], rows.shape) for rule in rules], -1)
        return causes, own, around

    def _around(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the outermost operator around (or at) each row, and of the nearest data loader; or -1."""
        events = self.trace.events
        operators = events.kind == Kind.OPERATOR
        operator, loader = np.full(len(rows), -1), np.full(len(rows), -1)
        at = rows
        while (at >= 0).any():
            operator = np.where((at >= 0) & operators[at], at, operator)
            loader = np.where((at >= 0) & self._loads[at] & (loader < 0), at, loader)
            at = np.where(at >= 0, self.parents[at], -1)
        return operator, loader
