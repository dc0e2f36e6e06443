"""What each operation takes in each step: the table that a comparison of two reports is made from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.traces.diff_attribution import Shares, Standing, attribute
from bench.traces.events import Kind, Trace
from bench.traces.matching import Frame, Key, Places, stable_name
from bench.traces.steps import Steps, steps
from bench.traces.tree import enclosing, launched_by, nearest, self_time

WHAT = {
    Standing.COMPUTE: "operation",
    Standing.OTHER_THREAD: "operation",
    Standing.COMMUNICATION: "communication",
    Standing.COPY: "copy",
    Standing.WAIT: "waiting",
    Standing.FUNCTION: "function",
    Standing.IDLE: "idle",
}
NOTHING_RECORDED = "nothing recorded"
LAUNCHED_BEFORE = "launched before the record began"
LAUNCHING = "launching"
# Instead of the number of a place or of a name:
_UNPLACED, _NOTHING, _BEFORE = -1, -2, -3


@dataclass
class StepTable:
    """keys: of the columns. nanoseconds, calls: (steps, keys). start: int64 (steps,) nanoseconds since 1970,
    or from the trace's origin where it is not ``absolute``. on_device: a device bounds the steps. given:
    steps are marked. kernels: for each key the nanoseconds of each kernel in all steps. trimmed: why steps
    were left out, counted. hosted: calls a step of the host's operators, where a device bounds the steps.
    """

    keys: list[Key]
    nanoseconds: np.ndarray
    calls: np.ndarray
    start: np.ndarray
    absolute: bool
    on_device: bool
    given: bool
    kernels: dict[Key, Counter[str]] = field(default_factory=dict)
    trimmed: Counter[str] = field(default_factory=Counter)
    hosted: dict[tuple[Frame, ...], float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.nanoseconds)


def step_table(trace: Trace) -> StepTable:
    """Of the complete steps of one trace."""
    above = enclosing(trace)
    cut = steps(trace).sampled()
    labels = Labels(trace, above)
    if trace.timed:
        shares = attribute(trace, above, cut)
    else:  # no places in time (cProfile): what a function spends itself, all in one step
        own = self_time(trace.events, above).astype(np.float64)
        rows, zeros = np.arange(len(own)), np.zeros(len(own), np.int32)
        shares = Shares(rows, np.full(len(own), Standing.FUNCTION, np.int8), zeros, own)
    column, keys = labels.columns(shares.row, shares.standing)
    shape = (len(cut), len(keys))
    taken = np.zeros(shape)
    np.add.at(taken, (shares.step, column), shares.nanoseconds)
    calls = np.zeros(shape)
    rows, first = np.unique(shares.row[shares.row >= 0], return_index=True)
    step = np.searchsorted(cut.start, trace.events.start[rows], "right") - 1
    counted = (step >= 0) & (shares.standing[shares.row >= 0][first] != Standing.IDLE)
    of_row = column[np.flatnonzero(shares.row >= 0)[first]]
    np.add.at(calls, (step[counted], of_row[counted]), trace.events.calls[rows[counted]])
    return StepTable(
        keys,
        taken,
        calls,
        cut.start + trace.origin_ns,
        trace.origin_ns > 0,
        labels.on_device,
        cut.given,
        labels.kernels(shares, column, keys),
        cut.trimmed,
        labels.hosted(cut) if labels.on_device else {},
    )


class Labels:
    """The key of each slice of a trace that can own a moment."""

    def __init__(self, trace: Trace, above: np.ndarray) -> None:
        self.trace, self.above = trace, above
        self.places = Places(trace, above)
        self.launch = launched_by(trace.events)
        devices = trace.on_device()
        self.on_device = bool((devices & (trace.events.kind != Kind.ANNOTATION)).any())
        self.host_only = ~devices

    def columns(self, row: np.ndarray, standing: np.ndarray) -> tuple[np.ndarray, list[Key]]:
        """(column of each share, key of each column)."""
        events = self.trace.events
        known = np.maximum(row, 0)
        # A slice of a device stands at the operator that launched it; where one call launches many (a
        # graph), or none is known, its own name tells them apart.
        place = np.where(self.host_only, self.places.number, self._launching_place())[known]
        own = np.where((place == _UNPLACED) | self._of_graph()[known], events.name[known], -1)
        own[place == _BEFORE] = _BEFORE
        idle = standing == Standing.IDLE
        place = np.where(idle, -1, place)
        own = np.where(idle, self._idle_reason()[known], own)
        own = np.where(row < 0, _NOTHING, own)
        table = np.stack((standing.astype(np.int64), place, own), 1)
        unique, inverse = np.unique(table, axis=0, return_inverse=True)
        column, keys = _merged([self._key(*part) for part in unique.tolist()])
        return column[inverse.reshape(-1)], keys

    def _key(self, standing: int, place: int, own: int) -> Key:
        what = WHAT[Standing(standing)]
        if own == _NOTHING:
            return Key(what, (Frame(NOTHING_RECORDED, ""),))
        if own == _BEFORE:
            return Key(what, (Frame(LAUNCHED_BEFORE, ""),))
        if own == -1 and what == "idle":
            return Key(what, (Frame(LAUNCHING if self.on_device else NOTHING_RECORDED, ""),))
        path = self.places.path(place) if place >= 0 else ()
        return Key(what, path + (self.places.own(own) if own >= 0 else ()))

    def _launching_place(self) -> np.ndarray:
        """int64 (rows,): the place of the operator that launched a slice of a device.

        A kernel that was launched before the record began stands where its name stands elsewhere in the
        record; if that is not one place, with the others of its kind.
        """
        events = self.trace.events
        operator = np.where(self.launch >= 0, self.places.operator[np.maximum(self.launch, 0)], -1)
        place = np.where(operator >= 0, self.places.number[np.maximum(operator, 0)], _UNPLACED)
        device = ~self.host_only & (events.kind != Kind.ANNOTATION)
        unknown = device & (self.launch < 0)
        if not unknown.any() or unknown.sum() * 2 > device.sum():
            return place  # a record without launches: names are all there is
        known = device & (place >= 0)
        least = np.full(len(self.trace.names), np.iinfo(np.int64).max)
        most = np.full(len(self.trace.names), _BEFORE)
        np.minimum.at(least, events.name[known], place[known])
        np.maximum.at(most, events.name[known], place[known])
        only = np.where(least == most, least, _BEFORE)
        place[unknown] = only[events.name[unknown]]
        return place

    def _of_graph(self) -> np.ndarray:
        known = self.launch >= 0
        launched = np.bincount(self.launch[known], minlength=len(self.launch) or 1)
        return known & (launched[np.maximum(self.launch, 0)] > 1) & ~self.host_only

    def _idle_reason(self) -> np.ndarray:
        """int64 (rows,): the name of the range, the data loader or the wait that a slice of the host is in,
        outermost; -1 in none."""
        events = self.trace.events
        names = [stable_name(name) for name in self.trace.names]
        loads = np.array(["DataLoader" in name for name in names] or [False], bool)[events.name]
        named = np.isin(events.kind, (Kind.ANNOTATION, Kind.WAIT, Kind.SYNCHRONIZATION)) | loads
        named &= self.host_only & ~np.isin(events.kind, (Kind.STEP, Kind.FUNCTION))
        found = nearest(named, self.above)
        while True:
            outer = np.where(found >= 0, self.above[np.maximum(found, 0)], -1)
            outer = np.where(outer >= 0, found[np.maximum(outer, 0)], -1)
            if not (outer >= 0).any():
                break
            found = np.where(outer >= 0, outer, found)
        return np.where(found >= 0, events.name[np.maximum(found, 0)], -1)

    def hosted(self, cut: Steps) -> dict[tuple[Frame, ...], float]:
        """Calls a step of every operator of the host."""
        step = np.searchsorted(cut.start, self.trace.events.start, "right") - 1
        inside = (step >= 0) & (self.trace.events.start < cut.end[np.maximum(step, 0)])
        places, calls = np.unique(self.places.number[inside & (self.places.number >= 0)], return_counts=True)
        return {
            self.places.path(place): count / len(cut)
            for place, count in zip(places.tolist(), calls.tolist(), strict=True)
        }

    def kernels(self, shares: Shares, column: np.ndarray, keys: Sequence[Key]) -> dict[Key, Counter[str]]:
        """Nanoseconds of each kernel that runs for a key."""
        known = np.flatnonzero((shares.row >= 0) & (shares.standing <= Standing.COPY))
        known = known[~self.host_only[shares.row[known]]]
        table = np.stack((column[known], self.trace.events.name[shares.row[known]]), 1)
        if not len(table):
            return {}
        unique, inverse = np.unique(table, axis=0, return_inverse=True)
        sums = np.bincount(inverse.reshape(-1), shares.nanoseconds[known])
        found: dict[Key, Counter[str]] = {}
        for (place, name), nanoseconds in zip(unique.tolist(), sums.tolist(), strict=True):
            found.setdefault(keys[place], Counter())[self.trace.names[name]] += nanoseconds
        return found


def _merged(keys: list[Key]) -> tuple[np.ndarray, list[Key]]:
    """Equal keys (of names that are one without their line numbers) in one column."""
    unique = list(dict.fromkeys(keys))
    where = {key: index for index, key in enumerate(unique)}
    return np.array([where[key] for key in keys], np.int64), unique
