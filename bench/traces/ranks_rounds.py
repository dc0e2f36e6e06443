"""Rounds: the stretches of a job in which its ranks are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.traces.collectives import Matched
from bench.traces.events import Trace
from bench.traces.steps import steps

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
    whole = np.all(matched.present, axis=1)
    operations = [key[0] for key in matched.keys]
    of_operation = np.array([operations.index(word) for word in operations], np.int64)[matched.key]
    rows = _marking(matched.key, whole)
    if len(rows) < ENOUGH:  # whatever their messages
        rows = _marking(of_operation, whole)
    if len(rows) < 2:
        none = np.empty((len(traces), 0), np.int64)
        return Rounds(none, none, "round", "no rounds")
    # Arrivals differ, which is the point; ends are common to all, where they were recorded.
    marks = np.where(matched.whole, matched.end[rows], matched.start[rows]) - np.array(bases(matched, traces))
    marks = np.sort(marks, axis=0).T
    said = f"{len(rows) - 1} rounds, each from one {operations[matched.key[rows[0]]]} to the next"
    return Rounds(marks[:, :-1], marks[:, 1:], "round", said)


def _marking(codes: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Rows of the rarest code that occurs often enough, else of the one that occurs most."""
    counts = np.bincount(codes[whole])
    if not len(counts):
        return np.empty(0, np.int64)
    often = np.flatnonzero(counts >= ENOUGH)
    chosen = often[np.argmin(counts[often])] if len(often) else np.argmax(counts)
    return np.flatnonzero(whole & (codes == chosen))


def _named_steps(trace: Trace) -> dict[str, tuple[int, int]]:
    found = steps(trace)
    if not found.given:
        return {}
    times = zip(found.start.tolist(), found.end.tolist(), strict=True)
    rows = zip(found.names, times, found.complete.tolist(), strict=True)
    return {name: time for name, time, complete in rows if complete}
