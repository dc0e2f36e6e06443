"""Adds to a schedule the sends and receives between ranks, so that no order of theirs can block."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from parallel.schedules.actions import COMPUTING, Kind, Schedule
from parallel.schedules.flat import flatten, needs


def without_communication(schedule: Schedule) -> Schedule:
    """The computing actions alone."""
    kept = [np.isin(rank[:, 0], COMPUTING) for rank in schedule.ranks]
    if all(mask.all() for mask in kept):
        return schedule
    return replace(schedule, ranks=tuple(rank[mask] for rank, mask in zip(schedule.ranks, kept, strict=True)))


def with_communication(schedule: Schedule) -> Schedule:
    """``schedule`` with a send behind each action whose result another rank needs, and its receive there.

    All ranks agree on one order of everything: computing by the time at which it ends when F = I = W, a
    message at the time at which it is computed. Each rank does its part in that order. So whatever comes
    first in it can always be done, even where a send returns only when it is received and a receive when it
    is sent, and where messages of two ranks use one queue both ways. A receive stands before the computing
    that is under way when the message comes, so that it is posted ahead.

    ValueError: the ranks wait for one another for ever.
    """
    from parallel.schedules.simulator import Durations, simulate

    timeline = simulate(schedule, Durations(1.0, 1.0, 1.0))
    schedule = timeline.schedule
    flat = flatten(schedule)
    need = needs(flat)
    consumer = np.flatnonzero((need >= 0) & (flat.rank[need] != flat.rank))
    producer = need[consumer]
    forward = flat.kind[producer] == Kind.FORWARD
    parts = [  # rank, time, whether a message, producer, kind, stage, micro-batch
        (flat.rank, timeline.end, 0, np.arange(len(need)), flat.kind, flat.stage, flat.microbatch),
        _messages(
            flat, timeline.end, producer, producer, np.where(forward, Kind.SEND_FORWARD, Kind.SEND_BACKWARD)
        ),
        _messages(
            flat,
            timeline.end,
            producer,
            consumer,
            np.where(forward, Kind.RECEIVE_FORWARD, Kind.RECEIVE_BACKWARD),
        ),
    ]
    columns = [np.concatenate([np.broadcast_to(part[i], part[0].shape) for part in parts]) for i in range(7)]
    rank, time, message, row, *actions = columns
    order = np.lexsort((row, message, time, rank))
    table = np.stack(actions, 1)[order].astype(np.int32)
    bounds = np.searchsorted(rank[order], np.arange(1, schedule.world_size))
    return replace(schedule, ranks=tuple(np.split(table, bounds)))


def _messages(flat, end, producer, at, kind):  # type: ignore[no-untyped-def]
    """The columns of messages of ``producer`` rows, as they stand at the ranks of the rows ``at``."""
    return flat.rank[at], end[producer], 1, producer, kind, flat.stage[at], flat.microbatch[at]
