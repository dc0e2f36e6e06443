"""What the timeline of one trace says: shares of the time of its complete steps (of all where none is).

On a device an operator's time is that of the kernels it launched: on the host it takes as long as a launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from msgspec.structs import replace

from bench.diagnosis.counted import Process, cpu_ns, windows_of
from bench.traces.breakdown import Activity, activities, breakdown, together
from bench.traces.causes import Cause, input_rows
from bench.traces.classify import is_communication_call
from bench.traces.events import Kind, Trace
from bench.traces.idle import idle_reasons
from bench.traces.intervals import Intervals, covered, intersect, subtract, total, union
from bench.traces.operations import operator_behind
from bench.traces.steps import main_lane, steps
from bench.traces.tree import launched_by, parents, self_time

SMALL_NS = 20_000
"""An operator whose own time is less does little but be called: torch's profiler adds some microseconds."""
CALL_NS = 1_300
"""What calling an operator costs before it computes, without a profiler and with autograd's part, where the
machine's own figure is not known: a training step on tensors of next to no size took 1.5 us for each operator
that was recorded of it, where a plain call took 0.8 us."""
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


def timeline(trace: Trace, process: Process, call_ns: float = CALL_NS) -> dict[str, float]:
    """The figures of ``Facts`` that one trace gives, by name. process: what was counted during its steps.
    call_ns: what calling an operator costs."""
    events, marked = trace.events, steps(trace).sampled()
    windows = windows_of(marked)
    whole = max(total(*windows), 1)
    above, units = parents(events), activities(trace)
    launched = launched_by(events)
    on_device = bool(units) and units[0].device >= 0
    own = self_time(events, above)
    inside = (events.kind == Kind.OPERATOR) & _inside(events.start, windows)
    operators = inside & ~_named(trace, is_communication_call)
    small = operators & (own < SMALL_NS)
    products = operators & (events.flops > 0)
    pointwise = operators & ~small & _named(trace, POINTWISE.__contains__)
    lengths = marked.end - marked.start
    if on_device:
        spent = ran = _kernel_time(trace, above, launched, windows)
        both, every = float(whole * len(units)), float(spent.sum())
        products, pointwise = (events.flops > 0), _named(trace, POINTWISE.__contains__)
    else:
        spent, ran = own, events.duration
        both, every = float(whole), float(own[operators].sum())
    parts = together([each for unit in units for each in breakdown(unit, windows.start, windows.end)])
    # Shares are of the time: what several threads (or streams) do at once is divided by how many they are.
    both *= max(1.0, every / parts.compute) if parts.compute else 1.0
    seconds = float(ran[products].sum()) / 1e9
    share_of_products = float(spent[products].sum()) / both
    found = {
        "steps": float(len(marked)),
        "step_s": float(np.median(lengths)) / 1e9 if len(lengths) else whole / 1e9,
        "calling": min(1.0, float(operators.sum()) * call_ns / cpu_ns(process, whole, len(lengths))),
        "small": min(1.0, float(own[small].sum()) / (whole if on_device else both)),
        "operators_per_s": float(operators.sum()) / whole * 1e9,
        "pointwise": float(spent[pointwise].sum()) / both,
        "products": share_of_products,
        "wide_products": share_of_products * _wide(trace),
        "flops_per_s": float(events.flops[products & (ran > 0)].sum()) / seconds if seconds else 0.0,
        **dict.fromkeys(("input", "gaps", "calls", "waits", "launches"), 0.0),
        **{name: parts.share(name) for name in ("exposed", "copies")},
    }
    if on_device:
        return found | _device_gaps(trace, units, above, launched, windows)
    return found | (_host_gaps(trace, units[0], windows) if units else {})


def _kernel_time(trace: Trace, above: np.ndarray, launched: np.ndarray, windows: Intervals) -> np.ndarray:
    """int64 (rows,): for each operator the nanoseconds in the windows of the kernels that it launched."""
    events = trace.events
    behind = operator_behind(trace, above, launched)
    rows = np.flatnonzero((behind >= 0) & (events.kind == Kind.KERNEL))
    found = np.zeros(len(events), np.int64)
    np.add.at(found, behind[rows], covered(windows, events.start[rows], events.end[rows]))
    return found


def _named(trace: Trace, wanted: Callable[[str], bool]) -> np.ndarray:
    """bool (rows,): the slice's name is one of those wanted."""
    names = np.array([wanted(name) for name in trace.names] or [False], bool)
    return names[trace.events.name]


def types_are_told(trace: Trace) -> bool:
    """Whether it is known how much of the products' time each type took: types are recorded with the host's
    time, which says nothing of a device's where there are several."""
    return not trace.on_device().any() or len(trace.product_ns) < 2


def _wide(trace: Trace) -> float:
    """Of the time of products that in 32 or 64 bits; 0 where types were not recorded."""
    if not types_are_told(trace):
        return 0.0
    every = sum(trace.product_ns.values())
    return sum(trace.product_ns.get(name, 0) for name in WIDE) / every if every else 0.0


def _inside(times: np.ndarray, windows: Intervals) -> np.ndarray:
    place = np.searchsorted(windows.start, times, "right") - 1
    return (place >= 0) & (times < np.append(windows.end, 0)[place])


def _host_gaps(trace: Trace, host: Activity, windows: Intervals) -> dict[str, float]:
    """Of a job without a device: when no operator ran, what the main thread did instead."""
    events, whole = trace.events, max(total(*windows), 1)
    rows = input_rows(trace) & (events.lane == main_lane(trace)) & (events.duration > 0)
    reading = intersect(union(events.start[rows], events.end[rows]), windows)
    idle = subtract(intersect(host.idle(), windows), reading)
    length = idle.end - idle.start
    return {
        "input": total(*reading) / whole,
        "gaps": float(length[length >= GAP_NS].sum()) / whole,
        "calls": float(length[length < GAP_NS].sum()) / whole,
    }


def _device_gaps(
    trace: Trace, units: Sequence[Activity], above: np.ndarray, launched: np.ndarray, windows: Intervals
) -> dict[str, float]:
    """Of devices: what they waited for during the steps. A device that starts late waited before, too."""
    span = len(units) * total(*windows) or 1
    found = dict.fromkeys(("input", "gaps", "calls", "waits", "launches"), 0.0)
    for unit in units:
        first, last = unit.window
        if len(windows.start):
            first, last = min(first, int(windows.start[0])), max(last, int(windows.end[-1]))
        for reason in idle_reasons(trace, replace(unit, window=(first, last)), above, launched, windows):
            fact = _OF_CAUSE.get(reason.cause)
            if fact:
                found[fact] += reason.time / span
    return found
