"""What the timeline of one trace says: shares of the time of its complete steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from bench.diagnosis.counted import cpu_ns
from bench.traces.breakdown import Activity, activities, breakdown, is_communication_call, together
from bench.traces.causes import Cause, is_input
from bench.traces.events import Kind, Trace
from bench.traces.idle import idle_reasons, main_lane
from bench.traces.intervals import Intervals, intersect, subtract, total, union
from bench.traces.steps import steps
from bench.traces.tree import launched_by, parents, self_time

SMALL_NS = 20_000
"""An operator whose own time is less does little but be called: torch's profiler adds some microseconds."""
CALL_NS = 1_300
"""What calling an operator costs before it computes, without a profiler and with autograd's part: a training
step on tensors of next to no size takes 1.5 us for each operator that is recorded of it."""
GAP_NS = 150_000
"""Between two operators. A shorter gap is the price of a call; in a longer one the program does something
else."""
POINTWISE = frozenset(
    f"aten::{name}{end}"
    for name in (
        *("add", "sub", "mul", "div", "neg", "pow", "sqrt", "rsqrt", "exp", "log", "erf", "tanh", "sigmoid"),
        *("mean", "sum", "amax", "max", "where", "masked_fill", "rsub", "reciprocal", "square", "addcmul"),
        *("addcdiv", "lerp", "maximum", "minimum", "clamp", "var", "std", "abs", "sign", "eq", "ge", "le"),
    )
    for end in ("", "_")
)
"""Operations that pass over memory once and compute next to nothing: what a fused operation would save."""
WIDE = ("float32", "float64")

_OF_CAUSE = {
    Cause.INPUT: "input",
    Cause.PYTHON: "gaps",
    Cause.BETWEEN: "calls",
    Cause.OPERATOR: "launches",
    Cause.RUNTIME: "launches",
    Cause.LATENCY: "launches",
    Cause.DEVICE: "waits",
}
"""The fact that a reason for an idle device belongs to."""


def timeline(trace: Trace) -> dict[str, float]:
    """The figures of ``Facts`` that one trace gives, by name."""
    events, marked = trace.events, steps(trace)
    windows = union(marked.start[marked.complete], marked.end[marked.complete])
    whole = max(total(*windows), 1)
    above, units = parents(events), activities(trace)
    own = self_time(events, above)
    inside = (events.kind == Kind.OPERATOR) & _inside(events.start, windows)
    operators = inside & ~_named(trace, is_communication_call)
    small = operators & (own < SMALL_NS)
    products = operators & (events.flops > 0)
    pointwise = operators & ~small & _named(trace, POINTWISE.__contains__)
    lengths = (marked.end - marked.start)[marked.complete]
    seconds = float(events.duration[products].sum()) / 1e9
    share_of_products = float(own[products].sum()) / whole
    found = {
        "steps": float(marked.complete.sum()),
        "step_s": float(np.median(lengths)) / 1e9 if len(lengths) else whole / 1e9,
        "calling": min(1.0, float(operators.sum()) * CALL_NS / cpu_ns(trace, whole, len(lengths))),
        "small": float(own[small].sum()) / whole,
        "operators_per_s": float(operators.sum()) / whole * 1e9,
        "pointwise": float(own[pointwise].sum()) / whole,
        "products": share_of_products,
        "wide_products": share_of_products * _wide(trace),
        "flops_per_s": float(events.flops[products].sum()) / seconds if seconds else 0.0,
        **dict.fromkeys(("input", "gaps", "calls", "waits", "launches", "exposed", "copies"), 0.0),
    }
    parts = [each for unit in units for each in breakdown(unit, windows.start, windows.end)]
    if parts:
        found |= {name: together(parts).share(name) for name in ("exposed", "copies")}
    if len(units) == 1 and units[0].device < 0:
        return found | _host_gaps(trace, units[0], windows)
    return found | _device_gaps(trace, units, above)


def _named(trace: Trace, wanted: Callable[[str], bool]) -> np.ndarray:
    """bool (rows,): the slice's name is one of those wanted."""
    names = np.array([wanted(name) for name in trace.names] or [False], bool)
    return names[trace.events.name]


def _wide(trace: Trace) -> float:
    """Of the time of products that in 32 or 64 bits; 0 where types were not recorded."""
    every = sum(trace.product_ns.values())
    return sum(trace.product_ns.get(name, 0) for name in WIDE) / every if every else 0.0


def _inside(times: np.ndarray, windows: Intervals) -> np.ndarray:
    place = np.searchsorted(windows.start, times, "right") - 1
    return (place >= 0) & (times < np.append(windows.end, 0)[place])


def _host_gaps(trace: Trace, host: Activity, windows: Intervals) -> dict[str, float]:
    """Of a job without a device: when no operator ran, what the main thread did instead."""
    events, whole = trace.events, max(total(*windows), 1)
    rows = _named(trace, is_input) & (events.lane == main_lane(trace)) & (events.duration > 0)
    reading = intersect(union(events.start[rows], events.end[rows]), windows)
    idle = subtract(intersect(host.idle(), windows), reading)
    length = idle.end - idle.start
    return {
        "input": total(*reading) / whole,
        "gaps": float(length[length >= GAP_NS].sum()) / whole,
        "calls": float(length[length < GAP_NS].sum()) / whole,
    }


def _device_gaps(trace: Trace, units: Sequence[Activity], above: np.ndarray) -> dict[str, float]:
    """Of devices: what they waited for, over the span of all."""
    launched = launched_by(trace.events)
    span = sum(unit.window[1] - unit.window[0] for unit in units) or 1
    found = dict.fromkeys(("input", "gaps", "calls", "waits", "launches"), 0.0)
    for unit in units:
        for reason in idle_reasons(trace, unit, above, launched):
            fact = _OF_CAUSE.get(reason.cause)
            if fact:
                found[fact] += reason.time / span
    return found
