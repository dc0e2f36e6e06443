"""The steps of a training loop as windows of time, and what cannot serve as one.

``torch.profiler`` writes ``ProfilerStep#7`` around a step, ``jax.profiler`` its ``StepTraceAnnotation``. The
window is the host's: work that a device does for a step after the host has left it counts where it runs, so
that steps never overlap and all sums are exact. Steps that are no sample of the loop stay in the list and are
marked: one at either end of the record with less than half of the usual number of operations (the recording
began or stopped in it), and one in which nothing was recorded at all.

A program that marks no steps but trains has them all the same: torch notes each call of an optimizer
(``Optimizer.step#AdamW.step``). There a step is what lies between the ends of two such calls.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
from msgspec import Struct, field
from msgspec.structs import replace

from bench.traces.events import Kind, Trace, distinct
from bench.traces.intervals import total, union

_NO_WORK = (Kind.FUNCTION, Kind.ANNOTATION, Kind.STEP, Kind.UNCLASSIFIED)
WHOLE = "whole trace"
_OPTIMIZER = "Optimizer.step#"


class Steps(Struct, frozen=True):
    """Steps in order of time.

    start, end: int64 (steps,) nanoseconds from the trace's origin; no two overlap.
    names: as in the file. complete: bool (steps,), False for what is not a sample of a step.
    given: False where the file has no steps: the whole trace is the only one. by: what marks them.
    trimmed: why steps are not complete, or left out, counted: {"empty": 30}.
    """

    start: np.ndarray
    end: np.ndarray
    names: list[str]
    complete: np.ndarray
    given: bool
    trimmed: Counter[str] = field(default_factory=Counter)
    by: str = ""

    def __len__(self) -> int:
        return len(self.start)

    def sampled(self) -> Steps:
        """The complete steps; all of them where none is, so that something can be said."""
        kept = np.flatnonzero(self.complete)
        if not len(kept):
            kept = np.arange(len(self))
        names = [self.names[index] for index in kept]
        return replace(
            self, start=self.start[kept], end=self.end[kept], names=names, complete=self.complete[kept]
        )

    def sentence(self) -> str:
        """How the trace is cut into steps, and what was put aside."""
        if not self.given:
            return "no steps are marked: the whole trace counts as one"
        text = f"{len(self)} step{'' if len(self) == 1 else 's'}{self.by and f' {self.by}'}"
        reasons = [f"{count} {reason}" for reason, count in self.trimmed.items()]
        return f"{text}, of which {', '.join(reasons)}" if reasons else text

    def named(self, wanted: str) -> int:
        """The place of the step with this name, or with this number at the end of its name.

        ValueError: none has it, or there are no steps.
        """
        if not self.given:
            raise ValueError(f"there is no step {wanted}: no steps are marked in this trace")
        for place, name in enumerate(self.names):
            if wanted == name or (wanted.isdecimal() and re.search(rf"(?<!\d)0*{int(wanted)}$", name)):
                return place
        from bench.report.units import text_of

        shown = [text_of(name, 40) for name in (self.names[0], self.names[-1])]
        raise ValueError(f"there is no step {text_of(wanted, 40)}; the steps are {shown[0]} to {shown[1]}")


def span(trace: Trace) -> tuple[int, int]:
    """Nanoseconds of the first start and the last end of what was recorded; (0, 0) of an empty trace."""
    events = trace.events
    if not len(events):
        return 0, 0
    return int(events.start.min()), int(events.end.max())


def steps(trace: Trace) -> Steps:
    """The steps of a trace; a trace without steps is one step, the whole of it."""
    events = trace.events
    rows = np.flatnonzero((events.kind == Kind.STEP) & (events.duration > 0))
    if not len(rows) or not trace.timed:
        return _between_optimizer_calls(trace) or _whole(trace)
    trimmed: Counter[str] = Counter()
    # A host thread marks the steps of the loop; a device's copy of the marks lags behind it.
    on_host = ~trace.on_device()[rows]
    marks = rows[on_host] if on_host.any() else rows
    lanes, counts = np.unique(events.lane[marks], return_counts=True)
    marks = marks[events.lane[marks] == lanes[counts.argmax()]]
    start, end = events.start[marks], events.end[marks]
    inside = np.append(False, start[1:] < np.maximum.accumulate(end)[:-1])
    if inside.any():
        trimmed["inside another and left out"] = int(inside.sum())
        marks, start, end = marks[~inside], start[~inside], end[~inside]
    complete = _complete(trace, start, end, trimmed)
    names = [trace.names[code] for code in events.name[marks]]
    return Steps(start, end, names, complete, given=True, trimmed=trimmed)


def main_lane(trace: Trace) -> int:
    """The host thread that runs the loop, -1 without one: it marks the steps, or calls the optimizer; else it
    is the one longest in operators (where there are none, in anything but collectives)."""
    events, on_host = trace.events, ~trace.on_device()
    for rows in (on_host & (events.kind == Kind.STEP), on_host & _calls_of_optimizers(trace)):
        if rows.any():
            return int(np.bincount(events.lane[rows]).argmax())
    works = on_host & (events.kind == Kind.OPERATOR)
    if not works.any():
        works = on_host & (events.kind != Kind.COMMUNICATION)
    rows = np.flatnonzero(works)
    busy = {
        lane: total(*union(events.start[own], events.end[own]))
        for lane in distinct(events.lane[rows]).tolist()
        if len(own := rows[events.lane[rows] == lane])
    }
    return max(busy, key=busy.__getitem__, default=-1)


def _calls_of_optimizers(trace: Trace) -> np.ndarray:
    """bool (rows,)"""
    called = np.array([name.startswith(_OPTIMIZER) for name in trace.names] or [False], bool)
    return called[trace.events.name] & (trace.events.kind == Kind.ANNOTATION)


def _whole(trace: Trace) -> Steps:
    first, last = span(trace)
    return Steps(np.array([first]), np.array([last]), [WHOLE], np.array([True]), given=False)


def _between_optimizer_calls(trace: Trace) -> Steps | None:
    """Steps from the end of one call of the optimizer to the end of the next; None without three such calls:
    two would make one step, which is no sample.

    What came before the first call is no step: it may hold the program's start. Of several optimizers the one
    that is called most often ends a step.
    """
    if not trace.timed:
        return None
    events = trace.events
    rows = np.flatnonzero(_calls_of_optimizers(trace) & ~trace.on_device())
    if not len(rows):
        return None
    called, counts = np.unique(events.name[rows], return_counts=True)
    ends = distinct(events.end[rows[events.name[rows] == called[counts.argmax()]]])
    if len(ends) < 3:
        return None
    trimmed = Counter({"before the first call left out": 1})
    start, end = ends[:-1], ends[1:]
    complete = _complete(trace, start, end, trimmed)
    names = [f"optimizer step {number}" for number in range(2, len(ends) + 1)]
    return Steps(
        start, end, names, complete, given=True, trimmed=trimmed, by="between calls of the optimizer"
    )


def _complete(trace: Trace, start: np.ndarray, end: np.ndarray, trimmed: Counter[str]) -> np.ndarray:
    events = trace.events
    is_work = ~np.isin(events.kind, _NO_WORK) & ~trace.on_device()
    if not is_work.any():
        is_work = ~np.isin(events.kind, _NO_WORK)
    begun = np.sort(events.start[is_work])
    operations = np.searchsorted(begun, end) - np.searchsorted(begun, start)
    complete = operations > 0
    if not complete.all():
        trimmed["empty"] = int((~complete).sum())
    full = np.flatnonzero(complete)
    if len(full) > 2:  # of two nobody can say which one is short
        usual = np.median(operations[full[1:-1]])
        for step, reason in ((full[0], "incomplete at the start"), (full[-1], "incomplete at the end")):
            if operations[step] < usual / 2:
                complete[step] = False
                trimmed[reason] += 1
    return complete
