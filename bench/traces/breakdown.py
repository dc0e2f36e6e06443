"""How time was spent: compute, communication (exposed, overlapped), copies, idle; exact, and sums close.

A device is busy with what runs on any of its streams. Its time is cut in this order, so that four parts sum
to the span to the nanosecond: *compute* (at least one kernel computes), *exposed communication* (none
computes, one communicates), *exposed copies* (memory is only copied or filled), *idle*. Communication that
runs beside compute is *overlapped*. For traces of one device these are the published definitions of
HolisticTraceAnalysis (temporal breakdown, communication-computation overlap) and of TraceLens (GPU timeline,
which counts fills as compute), but nothing is rounded, slices whose launch is not in the report count too,
and communication is what the reader classified as such, not what has "nccl" in its name.

A trace without device work is the host's: compute is the time in which at least one thread is in an operator
(in a function, where a profiler records nothing but functions) and not waiting, for a device, a lock, another
rank; communication is that of gloo and its like, on their own threads. The rest is *idle* of operators: the
process may well be busy in Python, and ``bench.traces.idle`` says so as far as the trace tells.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from msgspec import Struct

from bench.traces.classify import is_communication_call
from bench.traces.events import DEVICE_KINDS, Kind, Trace, distinct
from bench.traces.intervals import Intervals, covered, intersect, nothing, subtract, total, union
from bench.traces.steps import span

WAITS = (Kind.WAIT, Kind.SYNCHRONIZATION)
HOST = -1


class Activity(Struct, frozen=True):
    """What a device did, or the host (``device`` is -1), as sets of time.

    process: whose device it is (of its lanes), where several processes call a device by this number; else "".
    window: start and end in nanoseconds of all that is looked at. compute, communication, copies (and fills):
    each its own union; they may overlap one another.
    """

    device: int
    window: tuple[int, int]
    compute: Intervals
    communication: Intervals
    copies: Intervals
    process: str = ""

    @property
    def name(self) -> str:
        if self.device == HOST:
            return "host"
        return f"device {self.device}{self.process and f' ({self.process})'}"

    def lanes(self, trace: Trace) -> np.ndarray:
        """bool (lanes,): which of the trace's lanes are this device's."""
        mine = [lane.device == self.device and self.process in ("", lane.process) for lane in trace.lanes]
        return np.array(mine, bool)

    def busy(self) -> Intervals:
        """When anything ran."""
        return merge([self.compute, self.communication, self.copies])

    def idle(self) -> Intervals:
        """When nothing ran, within the window."""
        first, last = self.window
        return subtract(union(np.array([first]), np.array([last])), self.busy())

    def exposed(self) -> Intervals:
        """When only communication, or communication and a copy, ran."""
        return subtract(self.communication, self.compute)


class Parts(Struct, frozen=True):
    """Nanoseconds of a window; compute, exposed, copies and idle sum to the span.

    exposed, overlapped: communication without and beside compute. copies: memory copied or filled while
    nothing computed or communicated. Of several devices the sums.
    """

    span: int
    compute: int
    exposed: int
    copies: int
    idle: int
    overlapped: int

    @property
    def communication(self) -> int:
        return self.exposed + self.overlapped

    def share(self, part: str) -> float:
        """A part over the span; 0 of an empty window."""
        return getattr(self, part) / self.span if self.span else 0.0


def merge(sets: Sequence[Intervals]) -> Intervals:
    """The union of several sets."""
    sets = [one for one in sets if len(one.start)]
    if len(sets) < 2:
        return sets[0] if sets else nothing()
    return union(np.concatenate([one.start for one in sets]), np.concatenate([one.end for one in sets]))


def activities(trace: Trace) -> list[Activity]:
    """One for each device that did something; the host's where none did; none where nothing has a time."""
    if not trace.timed or not len(trace.events):
        return []
    events, on_device = trace.events, trace.on_device()
    work = on_device & np.isin(events.kind, (*DEVICE_KINDS, Kind.COMMUNICATION)) & (events.duration > 0)
    if not work.any():
        return [_host(trace)]
    rows = np.flatnonzero(work)
    # All devices are held against the same span: one that starts late was idle while the others worked.
    window = int(events.start[rows].min()), int(events.end[rows].max())
    # Where each rank sees one device only, each calls it device 0: a device is its number and its process.
    used = [trace.lanes[lane] for lane in distinct(events.lane[rows]).tolist()]
    units = sorted({(lane.device, lane.process) for lane in used})
    number = {unit: place for place, unit in enumerate(units)}
    sharing = Counter(device for device, _ in units)
    of_lane = np.array([number.get((lane.device, lane.process), -1) for lane in trace.lanes])
    place, found = of_lane[events.lane[rows]], []
    for (device, process), code in number.items():
        own = rows[place == code]
        kind, start, end = events.kind[own], events.start[own], events.end[own]
        copies = (kind == Kind.COPY) | (kind == Kind.SET)
        sets = (kind == Kind.KERNEL, kind == Kind.COMMUNICATION, copies)
        compute, moving, copying = (union(start[mask], end[mask]) for mask in sets)
        whose = process if sharing[device] > 1 else ""
        found.append(Activity(device, window, compute, moving, copying, whose))
    return found


def _host(trace: Trace) -> Activity:
    events = trace.events
    operators = events.kind == Kind.OPERATOR
    if not operators.any():
        operators = events.kind == Kind.FUNCTION
    # A call into torch.distributed hands work over, or waits for it: it computes nothing.
    calls = np.array([is_communication_call(name) for name in trace.names], bool)
    takes = np.isin(events.kind, (*WAITS, Kind.COMMUNICATION)) | (operators & calls[events.name])
    compute = []
    for first, last in lane_rows(trace):
        own = np.arange(first, last)
        works = own[operators[first:last]]
        if len(works):
            off = own[takes[first:last]]
            running = union(events.start[works], events.end[works])
            waiting = union(events.start[off], events.end[off])
            compute.append(subtract(running, waiting) if len(off) else running)
    rows = events.kind == Kind.COMMUNICATION
    communication = union(events.start[rows], events.end[rows])
    return Activity(HOST, span(trace), merge(compute), communication, nothing())


def lane_rows(trace: Trace) -> list[tuple[int, int]]:
    """First row and one past the last of each lane, in the lanes' order."""
    bounds = np.searchsorted(trace.events.lane, np.arange(len(trace.lanes) + 1)).tolist()
    return list(pairwise(bounds))


def breakdown(activity: Activity, start: np.ndarray, end: np.ndarray) -> list[Parts]:
    """The parts of each window [start, end); int64 nanoseconds."""
    exposed = activity.exposed()
    copies = subtract(activity.copies, merge([activity.compute, activity.communication]))
    overlapped = intersect(activity.communication, activity.compute)
    columns = [covered(each, start, end) for each in (activity.compute, exposed, copies, overlapped)]
    spans = np.asarray(end) - np.asarray(start)
    idle = spans - columns[0] - columns[1] - columns[2]
    rows = zip(*(each.tolist() for each in (spans, *columns[:3], idle, columns[3])), strict=True)
    return [Parts(*row) for row in rows]


def whole(activity: Activity) -> Parts:
    """The parts of the activity's own window."""
    first, last = activity.window
    return breakdown(activity, np.array([first]), np.array([last]))[0]


def together(parts: Sequence[Parts]) -> Parts:
    """The sums over devices: time of the whole is device time."""
    names = ("span", "compute", "exposed", "copies", "idle", "overlapped")
    return Parts(*(sum(getattr(each, name) for each in parts) for name in names))


class LaneTime(Struct, frozen=True):
    """A thread's or a stream's row: its index in ``Trace.lanes``, how many slices, and nanoseconds by kind.

    busy: when any slice but an annotation or a step is open. by_kind: the union of the slices of that kind.
    """

    lane: int
    slices: int
    busy: int
    by_kind: dict[Kind, int]


def lanes(trace: Trace) -> list[LaneTime]:
    """The time of each lane that has slices, the busiest first."""
    events, found = trace.events, []
    quiet = (Kind.ANNOTATION, Kind.STEP)
    for lane, (first, last) in enumerate(lane_rows(trace)):
        if first == last or not trace.timed:
            continue
        kind, start, end = events.kind[first:last], events.start[first:last], events.end[first:last]
        sets = {Kind(code): union(start[kind == code], end[kind == code]) for code in distinct(kind).tolist()}
        busy = merge([times for code, times in sets.items() if code not in quiet])
        by_kind = {code: total(*times) for code, times in sets.items()}
        found.append(LaneTime(lane, last - first, total(*busy), by_kind))
    return sorted(found, key=lambda each: (-each.busy, each.lane))


def exposed_by_name(trace: Trace, activity: Activity) -> dict[str, int]:
    """Nanoseconds of exposed communication by the collective that was under way, the longest first.

    Of two that run at once the one with the longer sum takes the time: the times sum to the exposed time.
    """
    events = trace.events
    rows = events.kind == Kind.COMMUNICATION
    if activity.device != HOST:
        rows &= activity.lanes(trace)[events.lane]
    rows, rest = np.flatnonzero(rows), activity.exposed()
    found: dict[str, int] = {}
    for code, own in by_length(events.name[rows], events.duration[rows], rows):
        time = intersect(rest, union(events.start[own], events.end[own]))
        if len(time.start):
            found[trace.names[code]] = total(*time)
            rest = subtract(rest, time)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def by_length(codes: np.ndarray, lengths: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Rows by their code, the code with the greatest sum of lengths first."""
    present, which = np.unique(codes, return_inverse=True)
    order = np.argsort(-np.bincount(which, weights=lengths, minlength=len(present)), kind="stable")
    for place in order.tolist():
        yield int(present[place]), rows[which == place]
