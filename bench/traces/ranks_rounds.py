"""Rounds: the stretches of a job in which ranks are compared, and each rank's own time in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.traces.breakdown import HOST, activities, is_communication_call, merge
from bench.traces.clocks import RankClock
from bench.traces.collectives import Matched
from bench.traces.events import Kind, Trace
from bench.traces.intervals import Intervals, covered, subtract, union
from bench.traces.steps import steps
from bench.traces.tree import parents

ENOUGH = 6  # calls of a collective, to take its calls for rounds


@dataclass(frozen=True)
class Rounds:
    """start, end: int64 (ranks, rounds) nanoseconds from each trace's own origin. unit: "step" or "round";
    said: how the job was cut, as a phrase."""

    start: np.ndarray
    end: np.ndarray
    unit: str
    said: str

    def __len__(self) -> int:
        return self.start.shape[1]


def bases(matched: Matched, traces: Sequence[Trace]) -> list[int]:
    """What turns times of each trace into those of ``matched``: nanoseconds to add."""
    return [trace.origin_ns - matched.origin_ns if matched.origin_ns else 0 for trace in traces]


def rounds_of(matched: Matched, traces: Sequence[Trace]) -> Rounds:
    """The steps that all ranks mark; without such, what lies between calls of one collective of all ranks:
    of those called often enough the rarest, which is most likely called once a step."""
    by_name = [_named_steps(trace) for trace in traces]
    common = [name for name in by_name[0] if all(name in found for found in by_name)]
    if len(common) > 1:
        times = np.array([[found[name] for name in common] for found in by_name], np.int64)
        return Rounds(times[:, :, 0], times[:, :, 1], "step", f"{len(common)} steps that all ranks mark")
    whole = matched.present.all(axis=1)
    counts = np.bincount(matched.key[whole], minlength=len(matched.keys))
    often = np.flatnonzero(counts >= ENOUGH)
    if len(often):
        key = int(often[np.argmin(counts[often])])
    else:
        key = int(np.argmax(counts)) if len(counts) else -1
    rows = np.flatnonzero(whole & (matched.key == key))
    if len(rows) < 2:
        return Rounds(*(np.empty((len(traces), 0), np.int64) for _ in range(2)), "round", "no rounds")
    # Arrivals differ, which is the point; ends are common to all, where they were recorded.
    marks = np.where(matched.whole, matched.end[rows], matched.start[rows]) - np.array(bases(matched, traces))
    marks = np.sort(marks, axis=0).T
    operation = matched.keys[key][0]
    said = f"{len(rows) - 1} rounds, each from one {operation} to the next"
    return Rounds(marks[:, :-1], marks[:, 1:], "round", said)


def _named_steps(trace: Trace) -> dict[str, tuple[int, int]]:
    found = steps(trace)
    if not found.given:
        return {}
    times = zip(found.start.tolist(), found.end.tolist(), strict=True)
    rows = zip(found.names, times, found.complete.tolist(), strict=True)
    return {name: time for name, time, complete in rows if complete}


def own_time(
    matched: Matched,
    traces: Sequence[Trace],
    clocks: Sequence[RankClock],
    rounds: Rounds,
    arrival: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """(own, waited), float64 (ranks, rounds) nanoseconds that sum to each round's length.

    A rank waits from its arrival at a collective until the last has arrived (or until it was let go), while
    nothing of it computes.
    """
    usable = np.array([clock.how != "unknown" for clock in clocks])
    present = matched.present & usable
    last = np.where(present, arrival, np.iinfo(np.int64).min).max(axis=1)
    own, waited = (np.zeros(rounds.start.shape) for _ in range(2))
    for column, (trace, base) in enumerate(zip(traces, bases(matched, traces), strict=True)):
        length = (rounds.end[column] - rounds.start[column]).astype(np.float64)
        here = np.flatnonzero(present[:, column])
        start = matched.start[here, column] - base
        until = start + (last[here] - arrival[here, column])
        if matched.whole[column]:
            until = np.minimum(until, matched.end[here, column] - base)
        waits = subtract(union(start, until), working(trace))
        waited[column] = covered(waits, rounds.start[column], rounds.end[column])
        own[column] = length - waited[column]
    return own, waited


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
