"""Whose each moment of a step is, so that what operations take adds up to the step, to the nanosecond.

A step is as long as what bounds it. Where there is a device, that is the device: a moment belongs to the
kernels that run in it; where none runs, to the collective that does (communication that no computation hides
is *exposed*); then to a copy; and a moment in which the device does nothing is idle, and is put down to what
the host was in. Without a device the host itself bounds the step: a moment belongs to the innermost operation
of the thread that marks the steps, then to those of other threads (autograd's), to exposed communication, to
a wait, to a Python function, and what is left is time between operations. Slices of equal standing that share
a moment share it equally.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from bench.traces.classify import is_communication_call
from bench.traces.events import DEVICE_KINDS, Events, Kind, Trace, distinct
from bench.traces.steps import Steps, main_lane


class Standing(IntEnum):
    """Why a moment is a slice's: what comes first takes it."""

    COMPUTE = 0
    OTHER_THREAD = 1  # computes on a thread of the host that is not the one of the steps
    COMMUNICATION = 2
    COPY = 3
    WAIT = 4
    FUNCTION = 5
    IDLE = 6
    NONE = 7  # takes no moment: hidden behind others by its nature


@dataclass(frozen=True)
class Shares:
    """row: int64 (n,) of the slice, -1 for a moment in which nothing was recorded. standing: int8 (n,).
    step: int32 (n,). nanoseconds: float64 (n,); over a step they sum to its length."""

    row: np.ndarray
    standing: np.ndarray
    step: np.ndarray
    nanoseconds: np.ndarray


def innermost(events: Events, parents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(start, end, row): the pieces of time in which a slice is the innermost of its lane.

    A slice that sticks out of its parent is cut at its end, one that overlaps its next sibling at that start,
    so that the pieces of a lane never overlap.
    """
    depth, end = nested(events, parents)
    rows = np.flatnonzero(end > events.start)
    # After each boundary the lane belongs to the slice that began, or to the parent of the one that ended.
    owner = np.concatenate((rows, parents[rows].astype(np.int64)))
    time = np.concatenate((events.start[rows], end[rows]))
    lane = np.tile(events.lane[rows], 2)
    # At one time what ends goes before what begins, inner before outer; what begins, outer before inner.
    order_at_once = np.concatenate((1 + depth[rows], -depth[rows]))
    order = np.lexsort((order_at_once, time, lane))
    owner, time, lane = owner[order], time[order], lane[order]
    length = np.append(time[1:] - time[:-1], 0)
    kept = (owner >= 0) & (length > 0) & (np.append(lane[1:], -1) == lane)
    return time[kept], time[kept] + length[kept], owner[kept]


def nested(events: Events, parents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(depth, end): of each slice its level below the lane, and its end cut so that slices nest."""
    depth = np.full(len(events), -1, np.int32)
    end = events.end.copy()
    level, rows = 0, np.flatnonzero(parents < 0)
    order = np.argsort(parents, kind="stable")
    families = parents[order]
    while len(rows):
        depth[rows] = level
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
        level += 1
    return depth, end


def standings(trace: Trace) -> np.ndarray:
    """int8 (rows,): the ``Standing`` of each slice of a trace."""
    events = trace.events
    found = np.full(len(events), Standing.NONE, np.int8)
    on_device = trace.on_device()
    kind = events.kind
    if (on_device & np.isin(kind, (*DEVICE_KINDS, Kind.COMMUNICATION))).any():
        found[on_device & (kind == Kind.KERNEL)] = Standing.COMPUTE
        found[on_device & (kind == Kind.COMMUNICATION)] = Standing.COMMUNICATION
        found[on_device & np.isin(kind, (Kind.COPY, Kind.SET))] = Standing.COPY
        found[~on_device & (events.lane == main_lane(trace))] = Standing.IDLE
        return found
    stepping = events.lane == main_lane(trace)
    carries = np.array([is_communication_call(name) for name in trace.names] or [False], bool)
    operator = kind == Kind.OPERATOR
    found[operator & stepping] = Standing.COMPUTE
    found[operator & ~stepping] = Standing.OTHER_THREAD
    found[kind == Kind.COMMUNICATION] = Standing.COMMUNICATION
    found[operator & carries[events.name]] = Standing.WAIT
    found[stepping & np.isin(kind, (Kind.WAIT, Kind.SYNCHRONIZATION, Kind.RUNTIME))] = Standing.WAIT
    found[stepping & (kind == Kind.FUNCTION)] = Standing.FUNCTION
    found[stepping & np.isin(kind, (Kind.ANNOTATION, Kind.STEP, Kind.UNCLASSIFIED))] = Standing.IDLE
    return found


def attribute(trace: Trace, parents: np.ndarray, steps: Steps) -> Shares:
    """Every moment of every step, once."""
    start, end, row = innermost(trace.events, parents)
    standing = standings(trace)[row]
    kept = standing != Standing.NONE
    start, end, row, step = _cut(start[kept], end[kept], row[kept], steps)
    standing = standings(trace)[row]
    time = distinct(np.concatenate((start, end, steps.start, steps.end)))
    length = np.diff(time).astype(np.float64)
    middle_step = np.searchsorted(steps.start, time[:-1], "right") - 1
    free = (middle_step >= 0) & (time[:-1] < steps.end[np.maximum(middle_step, 0)])
    first, last = np.searchsorted(time, start), np.searchsorted(time, end)
    nanoseconds = np.zeros(len(row))
    for level in Standing:
        pieces = np.flatnonzero(standing == level)
        if not len(pieces):
            continue
        count = np.bincount(first[pieces], minlength=len(time)) - np.bincount(
            last[pieces], minlength=len(time)
        )
        active = np.cumsum(count)[:-1]
        taken = free & (active > 0)
        shared = np.append(0.0, np.cumsum(np.where(taken, length / np.maximum(active, 1), 0.0)))
        nanoseconds[pieces] = shared[last[pieces]] - shared[first[pieces]]
        free &= ~taken
    unseen = np.bincount(middle_step[free], length[free], minlength=len(steps))
    silent = np.flatnonzero(unseen > 0)
    return Shares(
        np.concatenate((row, np.full(len(silent), -1))),
        np.concatenate((standing, np.full(len(silent), Standing.IDLE, np.int8))),
        np.concatenate((step, silent)).astype(np.int32),
        np.concatenate((nanoseconds, unseen[silent])),
    )


def _cut(
    start: np.ndarray, end: np.ndarray, row: np.ndarray, steps: Steps
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pieces cut at the borders of steps; what lies between steps is left out. (start, end, row, step)."""
    first = np.searchsorted(steps.end, start, "right")
    last = np.searchsorted(steps.start, end, "left")
    count = np.maximum(last - first, 0)
    piece = np.repeat(np.arange(len(start)), count)
    step = np.arange(len(piece)) - np.repeat(np.cumsum(count) - count, count) + first[piece]
    return (
        np.maximum(start[piece], steps.start[step]),
        np.minimum(end[piece], steps.end[step]),
        row[piece],
        step,
    )
