"""Which slice encloses which, what each spends itself, and which call launched what runs on a device.

Slices of a lane nest, in theory. In real files a child ends up to a microsecond after its parent (profilers
that round starts and durations to microseconds, each by itself), and some slices start inside one another and
end far outside. Enclosing therefore means: inside but for rounding. Whatever sticks out further is a sibling,
so that time is never charged to a slice it does not belong to.
"""

from __future__ import annotations

import heapq
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from bench.traces.events import Events, Kind, Trace
from bench.traces.intervals import Intervals, subtract, union

ROUNDING_NS = 1_000
"""A child may end this much after its parent, as long as most of the child lies inside."""

_NEVER = np.iinfo(np.int64).max
_ROUNDS = 64  # call stacks are rarely deeper; what is left goes row by row


def enclosing(trace: Trace) -> np.ndarray:
    """``parents`` of a trace; nothing encloses anything where durations are own times already."""
    return parents(trace.events) if trace.nested else np.full(len(trace.events), -1, np.int32)


def parents(events: Events) -> np.ndarray:
    """int32 (rows,): the row of the nearest enclosing slice on the same lane, -1 without.

    Of identical slices the first encloses the second. A slice of no duration counts as one nanosecond long:
    it lies in the slice that is open at its time, not in the one that ends there.
    """
    rows = len(events)
    start = events.start
    end = np.maximum(events.end, start + 1)
    # A slice is enclosed by the last one before it that ends no earlier than this.
    least = np.maximum(end - ROUNDING_NS, start + (end - start + 1) // 2)
    found = np.arange(-1, rows - 1, dtype=np.int32)
    found[np.flatnonzero(np.diff(events.lane, prepend=-1))] = -1
    # All rows between a row and its candidate are known not to enclose it. Where the candidate does not
    # either, nothing between it and its own candidate can: go on there.
    open_rows = np.flatnonzero(found >= 0)
    for _ in range(_ROUNDS):
        candidate = found[open_rows]
        wrong = end[candidate] < least[open_rows]
        open_rows = open_rows[wrong]
        found[open_rows] = found[candidate[wrong]]
        open_rows = open_rows[found[open_rows] >= 0]
        if not len(open_rows):
            return found
    _finish(found, open_rows, end, least)
    return found


def _finish(found: np.ndarray, open_rows: np.ndarray, end: np.ndarray, least: np.ndarray) -> None:
    """Row after row, from the first on: together they climb each level of the stack once."""
    known, ends, needed = found.tolist(), end.tolist(), least.tolist()
    for row in open_rows.tolist():
        candidate = known[row]
        while candidate >= 0 and ends[candidate] < needed[row]:
            candidate = known[candidate]
        known[row] = candidate
    found[open_rows] = np.asarray(known, np.int32)[open_rows]


def self_time(events: Events, parents: np.ndarray) -> np.ndarray:
    """int64 (rows,): nanoseconds of each slice that none of its children covers; never negative.

    A moment that two overlapping children cover is taken off once; what a child sticks out is not taken off.
    """
    children = np.flatnonzero(parents >= 0)
    above = parents[children]
    order = np.argsort(above, kind="stable")
    children, above = children[order], above[order]
    start = events.start[children]
    end = np.minimum(events.end[children], events.end[above])
    same = np.append(False, above[1:] == above[:-1])
    overlapping = same & np.append(False, start[1:] < end[:-1])
    if overlapping.any():
        # The latest end among the earlier siblings. Ranks instead of times, so that one running maximum
        # serves all families: each family's ranks lie above those of the family before it.
        family = np.cumsum(~same) - 1
        by_end = np.argsort(end, kind="stable")
        rank = np.empty(len(end), np.int64)
        rank[by_end] = np.arange(len(end))
        reached = np.maximum.accumulate(family * len(end) + rank) - family * len(end)
        latest = end[by_end[reached]]
        start[1:] = np.where(same[1:], np.maximum(start[1:], latest[:-1]), start[1:])
    own = events.duration.copy()
    if len(above):
        first = np.flatnonzero(~same)
        own[above[first]] -= np.add.reduceat(np.maximum(end - start, 0), first)
    return own


def launched_by(events: Events) -> np.ndarray:
    """int32 (rows,): for a slice of a device the row of the runtime call with its correlation, else -1.

    A call may launch many (a graph). Of several calls with one correlation the last, innermost, is taken.
    """
    found = np.full(len(events), -1, np.int32)
    known = events.correlation >= 0
    calls = np.flatnonzero(known & (events.kind == Kind.RUNTIME))
    launched = np.flatnonzero(known & (events.kind >= Kind.KERNEL) & (events.kind <= Kind.COMMUNICATION))
    if not len(calls) or not len(launched):
        return found
    calls = calls[np.argsort(events.correlation[calls], kind="stable")]
    keys = events.correlation[calls]
    wanted = events.correlation[launched]
    place = np.searchsorted(keys, wanted, "right") - 1
    found[launched] = np.where((place >= 0) & (keys[place] == wanted), calls[place], -1)
    return found


def nearest(kinds: np.ndarray, parents: np.ndarray) -> np.ndarray:
    """int32 (rows,): from each row itself upwards, the first row where the mask ``kinds`` holds; else -1."""
    found = np.where(kinds, np.arange(len(kinds), dtype=np.int32), parents)
    while True:
        # Each pass doubles the levels climbed: an ancestor that is not of the kind hands on its own.
        climbing = np.flatnonzero(found >= 0)
        climbing = climbing[~kinds[found[climbing]]]
        if not len(climbing):
            return found
        found[climbing] = found[found[climbing]]


class Segments(NamedTuple):
    """Disjoint pieces of a lane's time in order, each with the row of the slice that is innermost then.

    start, end: int64 nanoseconds. row: int32.
    """

    start: np.ndarray
    end: np.ndarray
    row: np.ndarray


def innermost(events: Events, parents: np.ndarray, first: int, last: int) -> Segments:
    """Who is innermost when, on the lane that has the rows from ``first`` to before ``last``.

    A slice is innermost from its start to the next start, and again from each child's end to the next start;
    each time at most to its own end. What a child sticks out of its parent, by rounding, is the child's.
    """
    rows = np.arange(first, last, dtype=np.int32)
    rows = rows[events.duration[first:last] > 0]  # the others are never innermost, and interrupt nothing
    start, end = events.start[rows], events.end[rows]
    following = np.append(start[1:], _NEVER)
    children = rows[parents[rows] >= 0]
    above = parents[children]
    resumed = events.end[children]
    interrupted = np.append(start, _NEVER)[np.searchsorted(start, resumed, "left")]
    begins = np.concatenate((start, resumed))
    ends = np.concatenate((np.minimum(end, following), np.minimum(events.end[above], interrupted)))
    owners = np.concatenate((rows, above))
    some = ends > begins
    order = np.flatnonzero(some)[np.argsort(begins[some], kind="stable")]
    begins, ends, owners = begins[order], ends[order], owners[order]
    if len(begins):
        begins[1:] = np.maximum(begins[1:], np.maximum.accumulate(ends)[:-1])
        some = ends > begins
        begins, ends, owners = begins[some], ends[some], owners[some]
    left = subtract(union(start, end), Intervals(begins, ends))
    if len(left.start):
        more = _resumed_without_a_child(left, rows, start, end)
        begins, ends, owners = (
            np.concatenate(pair) for pair in zip((begins, ends, owners), more, strict=True)
        )
        order = np.argsort(begins)
        begins, ends, owners = begins[order], ends[order], owners[order]
    return Segments(begins, ends, owners)


def innermost_everywhere(events: Events, parents: np.ndarray) -> Segments:
    """The same of all lanes, one after another."""
    bounds = np.flatnonzero(np.diff(events.lane, prepend=-1, append=-1)).tolist()
    found = [innermost(events, parents, first, last) for first, last in pairwise(bounds)]
    found.append(Segments(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int32)))
    return Segments(*(np.concatenate(columns) for columns in zip(*found, strict=True)))


def _resumed_without_a_child(
    left: Intervals, rows: np.ndarray, start: np.ndarray, end: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Segments of what slices that cross leave over: where one ends that is nobody's child, the last begun of
    those that are still open goes on. Nothing begins within a piece of ``left``."""
    found: list[tuple[int, int, int]] = []
    opened: list[tuple[int, int, int]] = []  # a heap, the last begun first: (-index, end, row)
    index = 0
    for begin, stop in zip(left.start.tolist(), left.end.tolist(), strict=True):
        while index < len(rows) and start[index] <= begin:
            heapq.heappush(opened, (-index, int(end[index]), int(rows[index])))
            index += 1
        while begin < stop:
            while opened[0][1] <= begin:
                heapq.heappop(opened)
            until = min(stop, opened[0][1])
            found.append((begin, until, opened[0][2]))
            begin = until
    begins, ends, owners = zip(*found, strict=True)
    return np.array(begins), np.array(ends), np.array(owners, dtype=np.int32)
