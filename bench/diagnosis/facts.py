"""A profile as the figures that the rules ask for: shares of time, rates, and what they are shares of.

They come from the trace (any profiler's), from what our recorder counts of the process beside it, and from
the constants of this machine. Each of the last two may be absent: then the figures are None, and ``lacks``
says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from bench.traces.breakdown import Activity, Parts, activities, breakdown, is_communication_call, together
from bench.traces.causes import Cause, is_input
from bench.traces.events import Job, Kind, Trace
from bench.traces.idle import idle_reasons, main_lane
from bench.traces.intervals import Intervals, intersect, subtract, total, union
from bench.traces.operations import roof_of
from bench.traces.steps import steps
from bench.traces.tree import launched_by, parents, self_time

SMALL_NS = 20_000
"""An operator whose own time is less does little but be called: torch's profiler adds some microseconds."""
CALL_NS = 3_000
"""What calling an operator costs before it computes: measured 3 to 5 us recorded, with autograd's part."""
GAP_NS = 150_000
"""Between two operators. A shorter gap is the price of a call; a longer one is a program doing something
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


@dataclass(frozen=True)
class Facts:
    """Shares are of the time of the steps, summed over ranks, and lie in 0 to 1 unless threads overlap.

    step_s: a typical step. input, gaps, calls: no operator runs and the main thread waits for input; does
    something else for long; goes from one operator to the next. calling: ``CALL_NS`` for each operator, over
    the CPU seconds where they were counted. small, pointwise, products: the own time of operators that are
    small; pass over memory; multiply matrices. wide_products: products in float32 or
    float64. flops_per_s: of products, by their time. exposed: only communication. waits, copies: the host
    waits for a device, a device only copies. launches: a device has nothing to do because the host is busy
    launching. late: of a round, what the latest rank's lateness costs; late_rank: who.
    system: of the CPU seconds those in the kernel. fault_s: seconds of all page faults, by this machine's
    constant, over the CPU seconds. switches_per_s: involuntary, by CPU second. threads: among which all
    ranks divide their operations. memory: what a step takes of what is left of the limit.
    faster: peak of a 16-bit type over float32's here. busiest: names, by fact, that the evidence quotes.
    lacks: what the profile or the machine does not tell, and what therefore cannot be seen.
    """

    ranks: int = 1
    on_device: bool = False
    steps: int = 0
    step_s: float = 0.0
    input: float = 0.0
    gaps: float = 0.0
    calls: float = 0.0
    calling: float = 0.0
    small: float = 0.0
    operators_per_s: float = 0.0
    pointwise: float = 0.0
    products: float = 0.0
    wide_products: float = 0.0
    flops_per_s: float = 0.0
    exposed: float = 0.0
    waits: float = 0.0
    copies: float = 0.0
    launches: float = 0.0
    late: float = 0.0
    late_rank: int = -1
    system: float | None = None
    faults_per_s: float | None = None
    fault_share: float | None = None
    switches_per_s: float | None = None
    threads: int | None = None
    cores: int | None = None
    memory: float | None = None
    memory_B: float | None = None
    memory_limit_B: float | None = None
    load: float | None = None
    faster: float | None = None
    busiest: Mapping[str, str] = ()  # type: ignore[assignment]
    lacks: Sequence[str] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Facts:
        known = {field.name for field in fields(cls)}
        return cls(**{"busiest": {}} | {key: value for key, value in data.items() if key in known})

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            found[field.name] = float(f"{value:.4g}") if isinstance(value, float) else value
        return found | {"busiest": dict(self.busiest), "lacks": list(self.lacks)}


def facts_of(job: Job) -> Facts:
    """Of all traces of a job. ValueError: none has places in time, or none holds an event."""
    traces = [trace for trace in job.traces if trace.timed and len(trace.events)]
    if not traces:
        raise ValueError(
            f"{job.source} says how long functions took but not when: a bottleneck shows in a "
            f"timeline; record "
            "one with perflab profile, torch.profiler or jax.profiler"
        )
    found = [_of_trace(trace) for trace in traces]
    numbers = {name: float(np.mean([one[name] for one in found])) for name in found[0] if name != "busiest"}
    lacks: list[str] = []
    counted = [trace.process for trace in traces if trace.process]
    process = _of_processes(counted) if len(counted) == len(traces) else {}
    if not process:
        lacks.append(
            "page faults, context switches, threads and the memory limit: the report was not recorded by "
            "perflab profile, so allocator, oversubscription and memory_capacity cannot be seen"
        )
    constants = _of_machine(traces[0], process)
    if not constants:
        lacks.append(
            "this machine's limits: the report is of another machine, or perflab calibrate has not run, so "
            "compute_precision and the cost of page faults cannot be judged"
        )
    return Facts(
        ranks=len(traces),
        on_device=bool(traces[0].on_device().any()),
        steps=int(numbers.pop("steps")),
        **numbers,
        **_lateness(job),
        **process,
        **_memory(traces),
        **constants,
        busiest=_together([one["busiest"] for one in found]),
        lacks=lacks,
    )


def _together(named: Sequence[Mapping[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for names in named:
        for fact, name in names.items():
            found.setdefault(fact, name)
    return found


def _of_trace(trace: Trace) -> dict[str, Any]:
    """Figures of one trace; ``busiest`` beside them."""
    events, marked = trace.events, steps(trace)
    windows = union(marked.start[marked.complete], marked.end[marked.complete])
    whole = max(total(*windows), 1)
    above, units = parents(events), activities(trace)
    own = self_time(events, above)
    rows = _inside(events.start, windows)
    operators = rows & (events.kind == Kind.OPERATOR)
    calls = np.array([is_communication_call(name) for name in trace.names] or [False])
    operators &= ~calls[events.name]
    own_share = _Shares(trace, own, whole)
    small = operators & (own < SMALL_NS)
    multiplies = operators & (events.flops > 0)
    pointwise_names = np.array([name in POINTWISE for name in trace.names] or [False])
    pointwise = operators & pointwise_names[events.name] & ~small
    seconds = float(events.duration[multiplies].sum()) / 1e9
    typed = sum(trace.product_ns.values())
    wide = sum(trace.product_ns.get(name, 0) for name in WIDE) / typed if typed else 0.0
    products = own_share(multiplies)
    parts = [each for unit in units for each in breakdown(unit, windows.start, windows.end)]
    summed = together(parts) if parts else Parts(whole, 0, 0, 0, 0, 0)
    busy = _busy_share(trace)
    found = {
        "calling": min(1.0, float(operators.sum()) * CALL_NS / (whole * busy)),
        "steps": float(marked.complete.sum()),
        "step_s": float(np.median((marked.end - marked.start)[marked.complete])) / 1e9
        if marked.complete.any()
        else whole / 1e9,
        "small": own_share(small),
        "operators_per_s": float(operators.sum()) / whole * 1e9,
        "pointwise": own_share(pointwise),
        "products": products,
        "wide_products": products * wide,
        "flops_per_s": float(events.flops[multiplies].sum()) / seconds if seconds else 0.0,
        "exposed": summed.share("exposed"),
        "copies": summed.share("copies"),
        "busiest": own_share.names | _places(trace.process),
    }
    host = units[0] if len(units) == 1 and units[0].device < 0 else None
    gaps = _host_gaps(trace, host, windows) if host is not None else _device_gaps(trace, units, above)
    return found | gaps


def _busy_share(trace: Trace) -> float:
    """CPU seconds over seconds of the recording, at most 1: on a busy machine the job only has a part of a
    core. 1 where they were not counted."""
    wall, user, system = (_number(trace.process.get(key)) for key in ("wall_s", "user_s", "system_s"))
    if not wall or user is None or system is None:
        return 1.0
    return min(1.0, max(0.01, (user + system) / wall))


class _Shares:
    """Own time of masked rows over the whole; remembers which name has the most."""

    def __init__(self, trace: Trace, own: np.ndarray, whole: int) -> None:
        self.trace, self.own, self.whole = trace, own, whole
        self.names: dict[str, str] = {}

    def __call__(self, rows: np.ndarray) -> float:
        time = float(self.own[rows].sum())
        return time / self.whole


def _places(process: Mapping[str, Any]) -> dict[str, str]:
    """Where the program's own code stood most often."""
    places = process.get("places")
    if not isinstance(places, list):
        return {}
    total_, found = _number(process.get("samples")) or 1.0, []
    for place in places:
        if isinstance(place, list) and len(place) == 3 and isinstance(place[0], str):
            found.append((place[0], _number(place[2]) or 0.0))
    names = [f"{name} {100 * count / total_:.0f} %" for name, count in found[:2]]
    return {"places": ", ".join(names)} if names else {}


def _inside(times: np.ndarray, windows: Intervals) -> np.ndarray:
    place = np.searchsorted(windows.start, times, "right") - 1
    return (place >= 0) & (times < np.append(windows.end, 0)[place])


def _host_gaps(trace: Trace, host: Activity, windows: Intervals) -> dict[str, float]:
    """Of a job without a device: when no operator ran, what the main thread did instead."""
    events, whole = trace.events, max(total(*windows), 1)
    loading = np.array([is_input(name) for name in trace.names] or [False])[events.name]
    main = events.lane == main_lane(trace)
    rows = loading & main & (events.duration > 0)
    reading = intersect(union(events.start[rows], events.end[rows]), windows)
    idle = subtract(intersect(host.idle(), windows), reading)
    length = idle.end - idle.start
    return {
        "input": total(*reading) / whole,
        "gaps": float(length[length >= GAP_NS].sum()) / whole,
        "calls": float(length[length < GAP_NS].sum()) / whole,
        "waits": 0.0,
        "launches": 0.0,
    }


def _device_gaps(trace: Trace, units: Sequence[Activity], above: np.ndarray) -> dict[str, float]:
    """Of devices: what they waited for."""
    launched = launched_by(trace.events)
    span = sum(unit.window[1] - unit.window[0] for unit in units) or 1
    found = dict.fromkeys(("input", "gaps", "calls", "waits", "launches"), 0.0)
    for unit in units:
        for reason in idle_reasons(trace, unit, above, launched):
            fact = _OF_CAUSE.get(reason.cause)
            if fact:
                found[fact] += reason.time / span
    return found


_OF_CAUSE = {
    Cause.INPUT: "input",
    Cause.PYTHON: "gaps",
    Cause.BETWEEN: "calls",
    Cause.OPERATOR: "launches",
    Cause.RUNTIME: "launches",
    Cause.LATENCY: "launches",
    Cause.DEVICE: "waits",
}


def _lateness(job: Job) -> dict[str, Any]:
    """What the latest rank costs the others."""
    if len(job.traces) < 2:
        return {}
    from bench.traces.ranks import compare_ranks

    late = compare_ranks(job).late
    if not late or late[0].cost is None:
        return {}
    return {"late": max(0.0, 1.0 - 1.0 / max(late[0].cost.ratio, 1.0)), "late_rank": late[0].rank}


def _number(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
    return float(value) if good else None


def _of_processes(counted: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What our recorder counted; empty where an entry is no number."""

    def sum_of(key: str) -> float:
        values = [_number(one.get(key)) for one in counted]
        if any(value is None for value in values):
            raise ValueError(key)
        return float(sum(value for value in values if value is not None))

    try:
        cpu = max(sum_of("user_s") + sum_of("system_s"), 1e-9)
        return {
            "system": sum_of("system_s") / cpu,
            "faults_per_s": sum_of("minor_faults") / cpu,
            "switches_per_s": sum_of("involuntary_switches") / cpu,
            "threads": int(sum_of("compute_threads")),
            "cores": int(sum_of("cores") / len(counted)),
            "load": _number(counted[0].get("load_average")),
        }
    except (KeyError, ValueError, TypeError):
        return {}


def _memory(traces: Sequence[Trace]) -> dict[str, Any]:
    """Of the rank that fills its limit most: what a step allocates at its peak, and of how much room."""
    found: dict[str, Any] = {}
    for trace in traces:
        limit, used = (_number(trace.process.get(key)) for key in ("memory_limit_B", "in_use_at_start_B"))
        if limit is None or used is None:
            continue
        allocated = trace.memory.allocated[trace.memory.device < 0]
        if len(allocated):
            taken = float(allocated.max() - allocated.min())
        else:
            taken = (_number(trace.process.get("resident_peak_B")) or 0.0) - used
        room = max(limit - used, 1.0)
        if taken / room > found.get("memory", 0.0):
            found = {"memory": taken / room, "memory_B": taken, "memory_limit_B": limit}
    return found


def _of_machine(trace: Trace, process: Mapping[str, Any]) -> dict[str, Any]:
    """Constants of this machine, where the trace was recorded on it."""
    from labs.machine import load_cached

    machine = load_cached()
    if machine is None or roof_of(trace) is None:
        return {}
    found: dict[str, Any] = {}
    wide, narrow = (machine.peak(name, unit="matrix") for name in ("float32", "float32"))
    narrow = max(
        (machine.get(f"matrix_{name}_1_flops") or 0.0 for name in ("bfloat16", "float16")), default=0
    )
    found["faster"] = max(1.0, narrow / wide) if wide else 1.0
    cost = machine.get("page_fault_s_per_byte")
    if cost and process:
        found["fault_share"] = process["faults_per_s"] * cost * PAGE_B
    return found


PAGE_B = 4096
