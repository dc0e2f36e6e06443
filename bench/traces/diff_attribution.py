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
from bench.traces.events import DEVICE_KINDS, Kind, Trace, distinct
from bench.traces.steps import Steps, main_lane
from bench.traces.tree import innermost_everywhere


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
    start, end, row = innermost_everywhere(trace.events, parents)
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
