"""A rank's own time: what it did itself, and not another rank, nor the system between its threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.traces.breakdown import HOST, activities, merge
from bench.traces.classify import is_communication_call
from bench.traces.clocks import RankClock
from bench.traces.collectives import Matched
from bench.traces.events import Kind, Trace, distinct
from bench.traces.intervals import Intervals, covered, nothing, subtract, union
from bench.traces.ranks_rounds import Rounds, bases
from bench.traces.tree import parents

SCHEDULING_NS = 5_000_000
"""A thread that was woken may be without a core for some periods of the scheduler, 3 ms each on a busy Linux
machine (measured: up to 3.5 ms in the median with 4 ranks on 2 cores)."""


@dataclass(frozen=True)
class Own:
    """float64 (ranks, rounds) nanoseconds, which sum to the rounds' lengths.

    waited: from the rank's arrival at a collective until the last has arrived (or until it was let go), while
    nothing of it computed. moved: the rest of the collective, while nothing computed. handed: from a host's
    call to the start of the collective on the backend's thread, and from its end until the host's thread went
    on, up to ``SCHEDULING_NS`` each. own: all else. elsewhere: of each rank, when it waited, moved or handed.
    """

    own: np.ndarray
    waited: np.ndarray
    moved: np.ndarray
    handed: np.ndarray
    elsewhere: list[Intervals]


def own_time(
    matched: Matched,
    traces: Sequence[Trace],
    clocks: Sequence[RankClock],
    rounds: Rounds,
    arrival: np.ndarray,
) -> Own:
    """What each rank did in each round. arrival: int64 (collectives, ranks) nanoseconds in one time."""
    usable = np.array([clock.how != "unknown" for clock in clocks])
    present = matched.present & usable
    last = np.where(present, arrival, np.iinfo(np.int64).min).max(axis=1)
    waited, moved, handed = (np.zeros(rounds.start.shape) for _ in range(3))
    elsewhere = []
    for column, (trace, base) in enumerate(zip(traces, bases(matched, traces), strict=True)):
        here = np.flatnonzero(present[:, column])
        start, end = matched.start[here, column] - base, matched.end[here, column] - base
        until = start + (last[here] - arrival[here, column])
        if matched.whole[column]:
            until = np.minimum(until, end)
        works = working(trace)
        waits = subtract(union(start, until), works)
        window = rounds.start[column], rounds.end[column]
        moves = handing = nothing()
        if matched.whole[column]:
            moves = subtract(subtract(union(start, end), works), waits)
            if not trace.on_device()[matched.row[here, column]].any():
                handing = subtract(_between_threads(trace, start, end), merge([works, waits, moves]))
        for sums, times in ((waited, waits), (moved, moves), (handed, handing)):
            sums[column] = covered(times, *window)
        elsewhere.append(merge([waits, moves, handing]))
    own = (rounds.end - rounds.start) - waited - moved - handed
    return Own(own, waited, moved, handed, elsewhere)


def _between_threads(trace: Trace, start: np.ndarray, end: np.ndarray) -> Intervals:
    """When a collective was handed to its thread and not begun, or ended and the host had not gone on.

    start, end: int64 (collectives,). The host goes on at the first beginning or end of anything on its other
    threads: the call that waited returns, or what enclosed it does.
    """
    events = trace.events
    other = ~np.isin(events.lane, distinct(events.lane[events.kind == Kind.COMMUNICATION]))
    calls = np.array([is_communication_call(name) for name in trace.names], bool)[events.name]
    edges = distinct(np.concatenate((events.start[other], events.end[other])))
    if not len(edges):
        return union(edges, edges)
    called = distinct(events.end[other & calls])
    after = np.searchsorted(edges, end, "right")
    until = np.where(after < len(edges), edges[np.minimum(after, len(edges) - 1)], end)
    before = edges[np.maximum(np.searchsorted(edges, start, "right") - 1, 0)]
    since = np.where(np.isin(before, called) & (before < start), before, start)
    return union(
        np.concatenate((np.maximum(since, start - SCHEDULING_NS), end)),
        np.concatenate((start, np.minimum(until, end + SCHEDULING_NS))),
    )


def working(trace: Trace) -> Intervals:
    """When a rank computes or copies: its devices do, or, without one, a thread is in an operator that calls
    no other. An operator around others may only wait in them (a hook that waits for its all_reduce)."""
    found = activities(trace)
    if any(activity.device != HOST for activity in found):
        return merge([part for activity in found for part in (activity.compute, activity.copies)])
    events = trace.events
    leaf = np.ones(len(events), bool)
    above = parents(events)
    leaf[above[above >= 0]] = False
    calls = np.array([is_communication_call(name) for name in trace.names], bool)
    rows = leaf & (events.kind == Kind.OPERATOR) & ~calls[events.name]
    return union(events.start[rows], events.end[rows])
