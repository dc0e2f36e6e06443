"""All that one trace says by itself: where time and memory went, in which operations, and why nothing ran."""

from __future__ import annotations

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from bench.traces.breakdown import (
    Activity,
    LaneTime,
    Parts,
    activities,
    breakdown,
    exposed_by_name,
    lanes,
    together,
    whole,
)
from bench.traces.causes import Reason
from bench.traces.events import DEVICE_KINDS, Trace
from bench.traces.idle import idle_reasons, stream_waits
from bench.traces.intervals import intersect, union
from bench.traces.memory import MemoryUse, memory_use
from bench.traces.operations import (
    Kernel,
    Operation,
    Sums,
    kernels,
    operations,
    operator_behind,
)
from bench.traces.roof import Roof, roof_of
from bench.traces.steps import Steps, steps
from bench.traces.tree import enclosing, launched_by, self_time

MOST_OPERATIONS = 200


class Unit(Struct, frozen=True):
    """A device, or the host of a trace without devices: its time as a whole and by step, and why it was idle.

    by_step: one for each of the analysis's steps. idle: its reasons sum to the idle time of the whole.
    waits: of the busiest stream for other streams, while the device was busy. exposed: nanoseconds of exposed
    communication by collective.
    """

    activity: Activity
    whole: Parts
    by_step: list[Parts]
    idle: list[Reason]
    waits: list[Reason]
    exposed: dict[str, int]


class Analysis(Struct, frozen=True):
    """Of one trace, or of one step of it. Times are nanoseconds.

    units: empty where slices have no place in time. whole, by_step: sums over the units; None, [] without
    any. operations: those with the most self or device time; sums: of all. unlinked: slices of devices whose
    launch is not in the report. step: the name of the step that all is about, "" for the whole trace.
    """

    trace: Trace
    steps: Steps
    step: str
    units: list[Unit]
    whole: Parts | None
    by_step: list[Parts]
    lanes: list[LaneTime]
    operations: list[Operation]
    sums: Sums
    kernels: list[Kernel]
    memory: list[MemoryUse]
    unlinked: int
    roof: Roof | None

    @property
    def on_device(self) -> bool:
        """Whether the units are devices; otherwise there is one, the host."""
        return bool(self.units) and self.units[0].activity.device >= 0

    @property
    def operation_count(self) -> int:
        """How many operations there are, listed or not."""
        return self.sums.count


def analyse(trace: Trace, step: str = "", most: int = MOST_OPERATIONS) -> Analysis:
    """Everything about a trace, or about one of its steps (by its name or the number at its end).

    most: how many operations. ValueError: there is no such step.
    """
    events = trace.events
    above, launched = enclosing(trace), launched_by(events)
    behind = operator_behind(trace, above, launched)
    marked = steps(trace)
    chosen = marked.named(step) if step else None
    found = activities(trace)
    rows, window = np.ones(len(events), bool), None
    if chosen is not None:
        window = int(marked.start[chosen]), int(marked.end[chosen])
        found = [_within(activity, window) for activity in found]
        rows = (events.start >= window[0]) & (events.start < window[1])
    units = [
        Unit(
            activity=activity,
            whole=whole(activity),
            by_step=breakdown(activity, marked.start, marked.end) if marked.given and not step else [],
            idle=idle_reasons(trace, activity, above, launched),
            waits=stream_waits(trace, activity, launched),
            exposed=exposed_by_name(trace, activity),
        )
        for activity in found
    ]
    roof = roof_of(trace)
    listed, sums = operations(trace, rows, self_time(events, above), behind, roof, most)
    work = np.isin(events.kind, DEVICE_KINDS) & rows
    return Analysis(
        trace=trace,
        steps=marked,
        step=marked.names[chosen] if chosen is not None else "",
        units=units,
        whole=together([unit.whole for unit in units]) if units else None,
        by_step=[together(parts) for parts in zip(*(unit.by_step for unit in units), strict=True)],
        lanes=lanes(trace) if chosen is None else [],
        operations=listed,
        sums=sums,
        kernels=kernels(trace, rows, behind),
        memory=memory_use(trace, marked, window),
        unlinked=int((work & (launched < 0)).sum()),
        roof=roof,
    )


def _within(activity: Activity, window: tuple[int, int]) -> Activity:
    """What of it lies in the window."""
    inside = union(np.array(window[:1]), np.array(window[1:]))
    sets = (activity.compute, activity.communication, activity.copies)
    compute, communication, copies = (intersect(each, inside) for each in sets)
    return replace(activity, window=window, compute=compute, communication=communication, copies=copies)
