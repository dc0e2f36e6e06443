"""Sets of time as sorted disjoint intervals: union, intersection, difference, exact to the nanosecond.

An interval is half-open, [start, end): slices that touch share no time, and one of length 0 covers none.
``Intervals`` made here are sorted, disjoint, not empty and do not touch, so that equal sets are equal arrays.
All is done with a few array operations: O(n log n) where something must be sorted, O(n) elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_EARLIEST = np.iinfo(np.int64).min
_LATEST = np.iinfo(np.int64).max


class Intervals(NamedTuple):
    """int64 nanoseconds, two arrays of equal length: where each interval starts and where it ends."""

    start: np.ndarray
    end: np.ndarray


def nothing() -> Intervals:
    """The empty set."""
    return Intervals(np.empty(0, np.int64), np.empty(0, np.int64))


def union(start: np.ndarray, end: np.ndarray) -> Intervals:
    """The time that at least one of these intervals covers; they may overlap and be in any order."""
    start, end = np.asarray(start, np.int64), np.asarray(end, np.int64)
    covers = end > start
    if not covers.all():
        start, end = start[covers], end[covers]
    if not len(start):
        return nothing()
    if (start[1:] < start[:-1]).any():
        order = np.argsort(start, kind="stable")
        start, end = start[order], end[order]
    reached = np.maximum.accumulate(end)
    first = np.flatnonzero(np.concatenate(([True], start[1:] > reached[:-1])))
    return Intervals(start[first], reached[np.append(first[1:], len(start)) - 1])


def total(start: np.ndarray, end: np.ndarray) -> int:
    """Nanoseconds that sorted disjoint intervals cover."""
    return int((end - start).sum())


def intersect(a: Intervals, b: Intervals) -> Intervals:
    """The time that lies in both."""
    # Interval i of ``a`` meets the intervals [first, last) of ``b``: one row for each pair that meets.
    first = np.searchsorted(b[1], a[0], "right")
    last = np.searchsorted(b[0], a[1], "left")
    count = np.maximum(last - first, 0)
    of_a = np.repeat(np.arange(len(count)), count)
    before = np.cumsum(count) - count
    of_b = np.arange(len(of_a)) - before[of_a] + first[of_a]
    return Intervals(np.maximum(a[0][of_a], b[0][of_b]), np.minimum(a[1][of_a], b[1][of_b]))


def subtract(a: Intervals, b: Intervals) -> Intervals:
    """The time that lies in ``a`` and not in ``b``, whose intervals may touch (``tree.Segments`` do)."""
    start, end = np.append(_EARLIEST, b[1]), np.append(b[0], _LATEST)
    between = end > start
    return intersect(a, Intervals(start[between], end[between]))


def covered(by: Intervals, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """int64 (n,): nanoseconds of each of these intervals, which may overlap, that lie in ``by``."""
    return _measure(by, np.asarray(end, np.int64)) - _measure(by, np.asarray(start, np.int64))


def _measure(of: Intervals, until: np.ndarray) -> np.ndarray:
    """Nanoseconds of the set that lie before each of these times."""
    complete = np.append(0, np.cumsum(of[1] - of[0]))
    begun = np.searchsorted(of[0], until, "right")
    # The last interval that has begun may still be running: what is left of it does not count.
    last_end = np.append(_EARLIEST, of[1])[begun]
    return complete[begun] - np.where(last_end > until, last_end - until, 0)
