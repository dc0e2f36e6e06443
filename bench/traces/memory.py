"""Memory over time: the peak, when, in which step and operator, and what each step leaves behind."""

from __future__ import annotations

import numpy as np
from msgspec import Struct

from bench.traces.events import Kind, Trace, distinct
from bench.traces.steps import Steps

_POINTS = 400  # of the curve: no screen shows more


class MemoryUse(Struct, frozen=True):
    """Allocated memory of one device, -1 the host, as the profiler sampled it.

    samples: how many. peak, first, last: bytes at the peak and in the first and last sample. peak_time: int
    nanoseconds from the trace's origin. peak_step: name of the step in which the peak lies, "" outside of
    all. peak_operator: the innermost operator then, "" between operators. growth: bytes that a complete step
    leaves allocated (the median over all steps, also where the rest is of one), None with fewer than three
    complete steps. curve: (nanoseconds, bytes), at most 400 points; each is the highest sample of its part of
    the time.
    """

    device: int
    samples: int
    peak: int
    first: int
    last: int
    peak_time: int
    peak_step: str
    peak_operator: str
    growth: int | None
    curve: list[tuple[int, int]]


def memory_use(trace: Trace, steps: Steps, window: tuple[int, int] | None = None) -> list[MemoryUse]:
    """One for each device that has samples, the host first. window: nanoseconds [start, end) outside of which
    samples only count for the growth."""
    inside = np.ones(len(trace.memory.time), bool)
    if window is not None:
        inside = (trace.memory.time >= window[0]) & (trace.memory.time < window[1])
    devices = distinct(trace.memory.device[inside]).tolist()
    return [_of_device(trace, steps, device, inside) for device in devices]


def _of_device(trace: Trace, steps: Steps, device: int, inside: np.ndarray) -> MemoryUse:
    own = np.flatnonzero(trace.memory.device == device)
    own = own[np.argsort(trace.memory.time[own], kind="stable")]
    growth = _growth(trace.memory.time[own], trace.memory.allocated[own], steps)
    own = own[inside[own]]
    time, allocated = trace.memory.time[own], trace.memory.allocated[own]
    at = int(allocated.argmax())
    moment = int(time[at])
    around = np.flatnonzero((steps.start <= moment) & (moment < steps.end) & steps.given)
    return MemoryUse(
        device=device,
        samples=len(time),
        peak=int(allocated[at]),
        first=int(allocated[0]),
        last=int(allocated[-1]),
        peak_time=moment,
        peak_step=steps.names[int(around[0])] if len(around) else "",
        peak_operator=_operator_at(trace, moment),
        growth=growth,
        curve=_curve(time, allocated),
    )


def _growth(time: np.ndarray, allocated: np.ndarray, steps: Steps) -> int | None:
    """Between the ends of complete steps, at each of which the last sample before it counts."""
    place = np.searchsorted(time, steps.end[steps.complete], "right") - 1
    left = allocated[place[place >= 0]]
    return int(np.median(np.diff(left))) if steps.given and len(left) > 2 else None


def _operator_at(trace: Trace, moment: int) -> str:
    """The operator that began last among those that are open on the host."""
    events = trace.events
    open_rows = np.flatnonzero(
        (events.kind == Kind.OPERATOR) & (events.start <= moment) & (moment <= events.end)
    )
    if not len(open_rows):
        return ""
    return trace.names[events.name[open_rows[events.start[open_rows].argmax()]]]


def _curve(time: np.ndarray, allocated: np.ndarray) -> list[tuple[int, int]]:
    if len(time) > _POINTS:
        # Parts of equal numbers of samples, not of equal time: it is where memory moves that one looks.
        bounds = np.linspace(0, len(time), _POINTS + 1).astype(np.int64)[:-1]
        peaks = np.maximum.reduceat(allocated, bounds)
        part = np.searchsorted(bounds, np.arange(len(time)), "right") - 1
        first = np.flatnonzero(allocated == peaks[part])
        chosen = first[np.unique(part[first], return_index=True)[1]]
        time, allocated = time[chosen], allocated[chosen]
    return list(zip(time.tolist(), allocated.tolist(), strict=True))
