"""Which operations took the time: on the host by self time, on devices by kernel and operator behind it.

An operation is a name with the shapes of its inputs. Its *self time* is what none of the slices inside it
covers, so that the self times of a thread add up. Its *device time* is that of the kernels, copies and fills
whose launch lies in the operator and in no operator further in (TraceLens calls it direct kernel time).
"""

from __future__ import annotations

import numpy as np
from msgspec import Struct

from bench.traces.events import DEVICE_KINDS, Kind, Trace
from bench.traces.roof import Roof
from bench.traces.tree import nearest

NO_OPERATOR = "(no operator)"
_NO_OPERATION = (Kind.ANNOTATION, Kind.STEP, Kind.UNCLASSIFIED)


class Operation(Struct, frozen=True):
    """An operation on the host. Times are nanoseconds, summed over its calls.

    time: from start to end; a call inside one of the same name counts twice. flops: as the profiler counted
    them, 0 where it did not. flops_per_second: over the device time where the trace has a device, else over
    ``time``; None where flops are unknown. of_roof: this rate over the ``Roof``, None without one.
    """

    kind: Kind
    name: str
    shape: str
    calls: int
    time: int
    self_time: int
    device_time: int
    flops: float
    flops_per_second: float | None
    of_roof: float | None


class Sums(Struct, frozen=True):
    """Over all operations: how many they are, nanoseconds of self and device time, self time of each kind."""

    count: int
    self_time: int
    device_time: int
    by_kind: dict[Kind, int]


class Kernel(Struct, frozen=True):
    """What ran on devices under one name: nanoseconds summed over calls, of the shortest and the longest.

    operator: of the operators that launched it the one it spent most for. operators: how many those are.
    bytes_per_second: for copies and collectives whose size the report tells, over those; else None.
    """

    kind: Kind
    name: str
    calls: int
    time: int
    shortest: int
    longest: int
    operator: str
    operators: int
    bytes_per_second: float | None


def operator_behind(trace: Trace, parents: np.ndarray, launched: np.ndarray) -> np.ndarray:
    """int32 (rows,): for a slice of a device the row of the innermost operator that launched it; else -1."""
    operator = nearest(trace.events.kind == Kind.OPERATOR, parents)
    return np.where(launched >= 0, operator[launched], -1)


def operations(
    trace: Trace,
    rows: np.ndarray,
    self_time: np.ndarray,
    behind: np.ndarray,
    roof: Roof | None,
    limit: int,
) -> tuple[list[Operation], Sums]:
    """The ``limit`` operations with the longest self time, in that order, and sums over all of them.

    Those with the longest device time are among them too. rows: mask of the rows to look at. self_time: of
    ``bench.traces.tree``. behind: of ``operator_behind``. roof: of ``roof_of``.
    """
    events = trace.events
    launched = np.flatnonzero((behind >= 0) & rows)
    device_time = np.zeros(len(events), np.int64)
    np.add.at(device_time, behind[launched], events.duration[launched])
    # An operator that began before the rows looked at still counts with what it launched among them.
    wanted = (rows | (device_time > 0)) & ~np.isin(events.kind, _NO_OPERATION) & ~trace.on_device()
    chosen = np.flatnonzero(wanted)
    shapes = len(trace.shapes) + 1
    keys = (events.name[chosen].astype(np.int64) * len(Kind) + events.kind[chosen]) * shapes
    keys += events.shape[chosen] + 1
    first, which = _groups(keys, len(trace.names) * len(Kind) * shapes)
    columns = (events.calls, events.duration, self_time, device_time)
    calls, time, own, device = (_sums(which, column[chosen], len(first)) for column in columns)
    flops = np.bincount(which, weights=events.flops[chosen], minlength=len(first))
    order = np.argsort(-own, kind="stable")
    longest_on_device = np.argsort(-device, kind="stable")[:limit]
    kept = np.zeros(len(first), bool)
    kept[order[:limit]] = True
    kept[longest_on_device[device[longest_on_device] > 0]] = True
    basis = device if len(launched) else time
    found = []
    for place in order[kept[order]].tolist():
        row = chosen[first[place]]
        known = flops[place] > 0 and basis[place] > 0
        rate = float(flops[place] / basis[place] * 1e9) if known else None
        found.append(
            Operation(
                kind=Kind(events.kind[row]),
                name=trace.names[events.name[row]],
                shape=trace.shapes[events.shape[row]] if events.shape[row] >= 0 else "",
                calls=int(calls[place]),
                time=int(time[place]),
                self_time=int(own[place]),
                device_time=int(device[place]),
                flops=float(flops[place]),
                flops_per_second=rate,
                of_roof=rate / roof.flops_per_second if rate is not None and roof else None,
            )
        )
    kinds = np.zeros(len(Kind), np.int64)
    np.add.at(kinds, events.kind[chosen], self_time[chosen])
    by_kind = {kind: int(kinds[kind]) for kind in Kind if kinds[kind]}
    return found, Sums(len(first), int(own.sum()), int(device.sum()), by_kind)


def kernels(trace: Trace, rows: np.ndarray, behind: np.ndarray) -> list[Kernel]:
    """What ran on devices, by name, the one with the longest sum first. rows: mask of those to look at."""
    events = trace.events
    work = rows & trace.on_device() & np.isin(events.kind, (*DEVICE_KINDS, Kind.COMMUNICATION))
    chosen = np.flatnonzero(work)
    if not len(chosen):
        return []
    chosen = chosen[np.argsort(events.name[chosen], kind="stable")]
    first = np.flatnonzero(np.diff(events.name[chosen], prepend=-1))
    length = events.duration[chosen]
    sized = events.bytes[chosen] >= 0
    moved = np.add.reduceat(np.where(sized, events.bytes[chosen], 0), first).tolist()
    moving = np.add.reduceat(np.where(sized, length, 0), first).tolist()
    sums = [np.add.reduceat(column, first).tolist() for column in (events.calls[chosen], length)]
    extremes = [ends.reduceat(length, first).tolist() for ends in (np.minimum, np.maximum)]
    operators = _operators(trace, chosen, behind[chosen], length)
    columns = zip(chosen[first].tolist(), *sums, *extremes, moved, moving, strict=True)
    found = [
        Kernel(
            kind=Kind(events.kind[row]),
            name=trace.names[events.name[row]],
            calls=calls,
            time=time,
            shortest=shortest,
            longest=longest,
            operator=operators[int(events.name[row])][0],
            operators=operators[int(events.name[row])][1],
            bytes_per_second=size / nanoseconds * 1e9 if nanoseconds else None,
        )
        for row, calls, time, shortest, longest, size, nanoseconds in columns
    ]
    return sorted(found, key=lambda kernel: -kernel.time)


def _operators(
    trace: Trace, rows: np.ndarray, behind: np.ndarray, length: np.ndarray
) -> dict[int, tuple[str, int]]:
    """For each name of these rows the operator with the greatest sum of lengths, and how many there are."""
    base = len(trace.names) + 1
    operator = np.where(behind >= 0, trace.events.name[behind], -1).astype(np.int64)
    keys, which = np.unique(
        trace.events.name[rows].astype(np.int64) * base + operator + 1, return_inverse=True
    )
    order = np.argsort(np.bincount(which, weights=length), kind="stable")
    found: dict[int, tuple[str, int]] = {}
    for key in keys[order].tolist():  # from short to long: the last one stays
        name, place = divmod(key, base)
        count = found.get(name, ("", 0))[1] + (place > 0)
        found[name] = (trace.names[place - 1] if place else NO_OPERATOR, count)
    return found


def _groups(keys: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each distinct key (below ``limit``) the place where it first stands; for each row its number."""
    if limit > 2 * len(keys) + 1_000_000:
        _, first, which = np.unique(keys, return_index=True, return_inverse=True)
        return first, which
    # A table over all possible keys, where there are not too many, is quicker than sorting the rows.
    place = np.full(limit, -1, np.int64)
    place[keys[::-1]] = np.arange(len(keys))[::-1]
    present = np.flatnonzero(place >= 0)
    first = place[present]
    place[present] = np.arange(len(present))
    return first, place[keys]


def _sums(which: np.ndarray, values: np.ndarray, groups: int) -> np.ndarray:
    """int64 (groups,): exact sums."""
    sums = np.zeros(groups, np.int64)
    np.add.at(sums, which, values)
    return sums
