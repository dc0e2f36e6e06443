"""Changes seeded into traces, consistently: what takes longer moves everything that comes after it.

A trace is altered as if the world stood still for a moment: whatever runs at that moment takes longer,
whatever has not begun begins later, on every lane, the marks of steps included. Each function returns a new
trace and leaves its argument as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace

from bench.traces.diff_attribution import Shares, attribute
from bench.traces.diff_rows import Row
from bench.traces.diff_steps import Labels
from bench.traces.events import Events, Job, Kind, Lane, Trace
from bench.traces.matching import Key
from bench.traces.steps import main_lane, steps
from bench.traces.tree import parents

CHANGES = ("kernel swapped", "operation slower", "operation added", "more communication")
SLOWER = 0.10  # the share by which an operation is made slower
ADDED = 0.02  # of the step: how long a new operation or collective takes
SWAPPED = 0.15  # the share by which another kernel is slower
LEAST = 0.03  # of the step of a host: the smallest operation that is changed
LEAST_ON_DEVICE = 0.01  # kernels vary by less


Changed = tuple[list[Trace], Callable[[Row], bool], str]


@dataclass(frozen=True)
class Seed:
    """The changed traces of a job, and whether a row of the comparison is the change."""

    job: Job
    found: Callable[[Row], bool]
    what: str


def seed(job: Job, change: str, rng: np.random.Generator) -> Seed:
    """One of CHANGES, somewhere in the steps, the same in every step of every trace."""
    seeded = {
        "kernel swapped": _kernel_swapped,
        "operation slower": _operation_slower,
        "operation added": _operation_added,
        "more communication": _more_communication,
    }
    traces, found, what = seeded[change]([_tidy(trace) for trace in job.traces], rng)
    return Seed(replace(job, traces=traces), found, f"{job.source}: {change}: {what}")


def _tidy(trace: Trace) -> Trace:
    """Without what profilers' rounding lets stick out: a pause there would tear a slice from its parent."""
    end = _nested_ends(trace.events, parents(trace.events))
    return replace(trace, events=replace(trace.events, duration=np.maximum(end - trace.events.start, 0)))


def _nested_ends(events: Events, parents: np.ndarray) -> np.ndarray:
    """The end of each slice, cut so that slices nest."""
    end = events.end.copy()
    rows = np.flatnonzero(parents < 0)
    order = np.argsort(parents, kind="stable")
    families = parents[order]
    while len(rows):
        inner = parents[rows] >= 0
        end[rows[inner]] = np.minimum(end[rows[inner]], end[parents[rows[inner]]])
        follows = (parents[rows[1:]] == parents[rows[:-1]]) & (
            events.lane[rows[1:]] == events.lane[rows[:-1]]
        )
        before = rows[:-1][follows]
        end[before] = np.minimum(
            end[before], np.maximum(events.start[rows[1:][follows]], events.start[before])
        )
        first = np.searchsorted(families, rows, "left")
        count = np.searchsorted(families, rows, "right") - first
        offsets = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        rows = order[np.repeat(first, count) + offsets]
    return end


def with_noise(trace: Trace, rng: np.random.Generator, spread: float) -> Trace:
    """Every piece of work takes a little longer than recorded, each by a random share of its own."""
    work = (Kind.OPERATOR, Kind.KERNEL, Kind.COPY, Kind.COMMUNICATION)
    rows = np.flatnonzero(np.isin(trace.events.kind, work))
    return _stretched(trace, rows, np.abs(rng.normal(0, spread, len(rows))) * trace.events.duration[rows])


def _operation_slower(traces: list[Trace], rng: np.random.Generator) -> Changed:
    key = _some_operation(traces[0], rng)
    changed = []
    for trace in traces:
        rows, taken = _slices(trace, key)
        changed.append(_stretched(trace, rows, SLOWER * taken))
    return changed, lambda row: _is(row, key), str(key.path[-1])


def _kernel_swapped(traces: list[Trace], rng: np.random.Generator) -> Changed:
    """Other kernels under the same operator (on a host: another operator in its place), 15 % slower."""
    key = _some_operation(traces[0], rng)
    other = "another::implementation"
    changed = []
    for trace in traces:
        rows, taken = _slices(trace, key)
        name = trace.events.name.copy()
        name[rows] = len(trace.names)
        swapped = replace(trace, names=[*trace.names, other], events=replace(trace.events, name=name))
        changed.append(_stretched(swapped, rows, SWAPPED * taken))
    around = tuple(frame.name for frame in key.path[:-1])

    def found(row: Row) -> bool:
        place = (*row.path, row.name)
        around_it = row.change == "other implementation" and place == around[: len(place)]
        return _is(row, key) or row.name == other or around_it

    return changed, found, str(key.path[-1])


def _operation_added(traces: list[Trace], rng: np.random.Generator) -> Changed:
    """A new operator in each step, with a kernel where the trace has a device."""
    changed = [_with_slices(trace, rng, Kind.KERNEL, "aten::added") for trace in traces]
    return changed, lambda row: row.name == "aten::added" and row.change == "added", ""


def _more_communication(traces: list[Trace], rng: np.random.Generator) -> Changed:
    changed = [_with_slices(trace, rng, Kind.COMMUNICATION, "gloo:all_reduce") for trace in traces]
    return changed, lambda row: row.what == "communication" and row.seconds > 0, ""


class Disturbed(AssertionError):
    """Something else took the time of a recording: there is nothing in it to change."""


def _some_operation(trace: Trace, rng: np.random.Generator) -> Key:
    """An operation that takes LEAST of the step, or LEAST_ON_DEVICE."""
    shares, column, keys = _attributed(trace)
    taken = np.bincount(column, shares.nanoseconds, len(keys))
    least = LEAST_ON_DEVICE if trace.on_device().any() else LEAST
    large = np.flatnonzero(taken >= least * taken.sum())
    candidates = [index for index in large if keys[index].what == "operation"]
    if not candidates:
        raise Disturbed(f"no operation of {trace.source} takes {least:.0%} of its steps")
    return keys[rng.choice(candidates)]


def _slices(trace: Trace, key: Key) -> tuple[np.ndarray, np.ndarray]:
    """(slices, nanoseconds of the steps that each takes) of an operation."""
    shares, column, keys = _attributed(trace)
    mine = (column == keys.index(key)) & (shares.row >= 0)
    rows, inverse = np.unique(shares.row[mine], return_inverse=True)
    return rows, np.bincount(inverse, shares.nanoseconds[mine])


def _attributed(trace: Trace) -> tuple[Shares, np.ndarray, list[Key]]:
    above = parents(trace.events)
    shares = attribute(trace, above, steps(trace))
    return (shares, *Labels(trace, above).columns(shares.row, shares.standing))


def _is(row: Row, key: Key) -> bool:
    names = tuple(frame.name for frame in key.path)
    return row.what == key.what and (*row.path, row.name) == names and row.shape == key.path[-1].shape


def _stretched(trace: Trace, rows: np.ndarray, by: np.ndarray) -> Trace:
    """Each of these slices takes so many nanoseconds longer."""
    events = trace.events
    at = events.start[rows] + np.maximum(events.duration[rows], 1) - 1
    return _standing_still(trace, at, np.asarray(by, np.int64))[0]


def _standing_still(trace: Trace, at: np.ndarray, by: np.ndarray) -> tuple[Trace, np.ndarray]:
    """The world stands still at the moments ``at`` for ``by`` nanoseconds; also when each pause begins."""
    order = np.argsort(at, kind="stable")
    moments, total = at[order], np.append(0, np.cumsum(by[order]))
    events = trace.events
    columns = {name: getattr(events, name) for name in Events.DTYPES}
    columns["start"] = events.start + total[np.searchsorted(moments, events.start, "right")]
    end = events.end + total[np.searchsorted(moments, events.end, "left")]
    columns["duration"] = np.maximum(end - columns["start"], 0)
    pauses = np.empty_like(at)
    pauses[order] = moments + total[:-1]
    return replace(trace, events=Events.of(**columns)), pauses


def _with_slices(trace: Trace, rng: np.random.Generator, kind: Kind, name: str) -> Trace:
    """In each step one more slice of ``kind``, for which everything waits ADDED of a step."""
    cut = steps(trace)
    by = np.maximum((ADDED * (cut.end - cut.start)).astype(np.int64), 10)
    device = trace.on_device() & (trace.events.kind != Kind.ANNOTATION)
    if not device.any():
        at = _moments(trace, np.isin(trace.events.kind, (Kind.OPERATOR, Kind.COMMUNICATION)), rng)
        return _on_host(trace, at, by, kind, name)
    kernels = np.flatnonzero(device & (trace.events.kind == Kind.KERNEL))
    return _on_device(trace, _moments(trace, device, rng), by, kind, name, int(trace.events.lane[kernels[0]]))


def _moments(trace: Trace, work: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each step a random moment in which one of the slices ``work`` has ended and none runs."""
    cut = steps(trace)
    start, end = np.sort(trace.events.start[work]), np.sort(trace.events.end[work])
    free = end[np.searchsorted(start, end, "left") == np.searchsorted(end, end, "right")]
    first, last = np.searchsorted(free, cut.start), np.searchsorted(free, cut.end)
    picked = first + (rng.random(len(cut)) * (last - first)).astype(np.int64)
    inside = picked < last
    return np.where(inside, free[np.minimum(picked, len(free) - 1)], cut.end - 1)


def _on_host(trace: Trace, at: np.ndarray, by: np.ndarray, kind: Kind, name: str) -> Trace:
    later, start = _standing_still(trace, at, by)
    lane, lanes = main_lane(trace), trace.lanes
    if kind == Kind.COMMUNICATION:
        lane, lanes = len(lanes), [*lanes, Lane(lanes[lane].process, "thread gloo")]
    kind = Kind.COMMUNICATION if kind == Kind.COMMUNICATION else Kind.OPERATOR
    return _inserted(replace(later, lanes=lanes), [(start, by, kind, name, lane, -1)])


def _on_device(trace: Trace, at: np.ndarray, by: np.ndarray, kind: Kind, name: str, lane: int) -> Trace:
    """The host takes no time for the launch; the device's slice begins where everything waits for it."""
    later, start = _standing_still(trace, at, by)
    correlation = int(later.events.correlation.max()) + 1 + np.arange(len(at))
    host, begun = main_lane(trace), steps(later).start + 1  # where no other operator is open
    launch = [(begun, np.full_like(by, 4), Kind.OPERATOR, name, host, -1)]
    launch += [(begun + 1, np.full_like(by, 2), Kind.RUNTIME, "cudaLaunchKernel", host, correlation)]
    lanes = [*later.lanes, replace(later.lanes[lane], thread="stream of the addition")]
    kernel = (start, by, kind, f"kernel of {name}", len(lanes) - 1, correlation)
    return _inserted(replace(later, lanes=lanes), [*launch, kernel])


def _inserted(trace: Trace, slices: list[tuple]) -> Trace:
    events, names = trace.events, list(trace.names)
    columns = {column: [getattr(events, column)] for column in Events.DTYPES}
    for start, duration, kind, name, lane, correlation in slices:
        count = len(start)
        if name not in names:
            names.append(name)
        given = {"start": start, "duration": duration, "kind": kind, "name": names.index(name), "lane": lane}
        given["correlation"] = correlation
        for column, dtype in Events.DTYPES.items():
            value = given.get(column, Events.MISSING.get(column))
            columns[column].append(np.broadcast_to(np.asarray(value, dtype), (count,)))
    joined = {column: np.concatenate(parts) for column, parts in columns.items()}
    return replace(trace, names=names, events=Events.of(**joined))
