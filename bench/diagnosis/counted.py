"""What our recorder counted of the processes beside the profiler (``bench/profile/process.py``), as figures.

The entry may come from anywhere: what is no number counts as absent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bench.traces.events import Trace


def number(value: Any) -> float | None:
    """A finite number of JSON, or None."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def cpu_ns(trace: Trace, whole: int, steps: int) -> float:
    """CPU nanoseconds of so many steps that took ``whole`` nanoseconds: on a busy machine a job has only a
    part of a core. By the steps that were counted without a profiler, else by the recording's CPU seconds
    over its seconds (at most 1), else all of it."""
    wall, user, system, counted_steps = (
        number(trace.process.get(key)) for key in ("wall_s", "user_s", "system_s", "steps")
    )
    if not wall or user is None or system is None:
        return float(whole)
    if counted_steps and steps and user + system > 0:
        return (user + system) / counted_steps * steps * 1e9
    return whole * min(1.0, max(0.01, (user + system) / wall))


def counted(traces: Sequence[Trace]) -> dict[str, Any]:
    """The figures of ``Facts`` that all ranks' processes give, by name; empty where one lacks some."""

    def sum_of(key: str) -> float:
        values = [number(trace.process.get(key)) for trace in traces]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            raise KeyError(key)
        return sum(known)

    try:
        cpu = max(sum_of("user_s") + sum_of("system_s"), 1e-9)
        found: dict[str, Any] = {
            "system": sum_of("system_s") / cpu,
            "faults_per_s": sum_of("minor_faults") / cpu,
            "switches_per_s": (sum_of("involuntary_switches") + sum_of("voluntary_switches")) / cpu,
        }
        for key in ("compute_threads", "cores"):
            sum_of(key)  # KeyError where one is no number
        found |= dict(zip(("threads", "cores"), _fullest_host(traces), strict=True))
    except KeyError:
        return {}
    return found | {"load": number(traces[0].process.get("load_average"))} | _memory(traces)


def _fullest_host(traces: Sequence[Trace]) -> tuple[int, int]:
    """(threads, cores) of the host whose ranks together have the most threads for a core."""
    threads: dict[str, int] = {}
    cores: dict[str, int] = {}
    for trace in traces:
        host = trace.facts.get("host", "")
        threads[host] = threads.get(host, 0) + int(trace.process["compute_threads"])
        cores[host] = max(cores.get(host, 1), int(trace.process["cores"]))
    fullest = max(threads, key=lambda host: threads[host] / cores[host])
    return threads[fullest], cores[fullest]


def _memory(traces: Sequence[Trace]) -> dict[str, Any]:
    """Of the rank that fills its limit most: what it allocates at its peak, and of how much room. Without
    samples of memory in the trace it is what the process grew by."""
    found: dict[str, Any] = {}
    for trace in traces:
        limit, used = (number(trace.process.get(key)) for key in ("memory_limit_B", "in_use_at_start_B"))
        if limit is None or used is None:
            continue
        allocated = trace.memory.allocated[trace.memory.device < 0]
        if len(allocated):
            taken = float(allocated.max() - allocated.min())
        else:
            taken = (number(trace.process.get("resident_peak_B")) or 0.0) - used
        share = taken / (limit - used) if limit > used else 1.0  # over its limit there is no room at all
        if share > found.get("memory", 0.0):
            found = {"memory": share, "memory_B": taken, "memory_limit_B": limit}
    return found


def places(process: Mapping[str, Any]) -> str:
    """Where the program's own code stood most often: "load (data.py:7) 61 %, step (train.py:30) 12 %"."""
    listed, samples = process.get("places"), number(process.get("samples"))
    if not isinstance(listed, list) or not samples:
        return ""
    found = []
    for place in listed[:2]:
        if isinstance(place, list) and len(place) == 3 and isinstance(place[0], str):
            found.append(f"{place[0]} {100 * (number(place[2]) or 0.0) / samples:.0f} %")
    return ", ".join(found)
