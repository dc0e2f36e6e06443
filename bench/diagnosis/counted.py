"""What our recorder counted of the processes beside the profiler (``bench/profile/process.py``), as figures.

A lab's variant is counted over its steps alone. A program is counted from ``import torch`` to its end, with a
series of samples; what belongs to its steps is cut out of it: of them are the trace's shares.

The entry may come from anywhere: what is no number counts as absent.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.traces.events import Trace
from bench.traces.intervals import Intervals, covered, total, union
from bench.traces.steps import Steps, steps

Process = Mapping[str, Any]
_SERIES = ("time_ns", "user_us", "system_us", "minor_faults", "voluntary_switches", "involuntary_switches")


def number(value: Any) -> float | None:
    """A finite number of JSON, or None."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def windows_of(marked: Steps) -> Intervals:
    """The time of these steps."""
    return union(marked.start, marked.end)


def process_of(trace: Trace) -> Process:
    """What was counted during the steps: as the recorder gives it, or cut out of its series where the steps
    are a part of what was recorded."""
    marked = steps(trace)
    samples = _samples(trace)
    if samples is None or not marked.given or "steps" in trace.process or not trace.origin_ns:
        return trace.process
    windows = windows_of(marked.sampled())
    times = samples["time_ns"] - trace.origin_ns
    inside = covered(windows, times[:-1], times[1:]) / np.maximum(np.diff(times), 1)
    if not inside.any():
        return trace.process
    names = {"user_us": "user_s", "system_us": "system_s"}
    found: dict[str, Any] = dict(trace.process)
    found["wall_s"] = total(*windows) / 1e9
    # The recorder looks every few milliseconds: an interval that a step's edge divides counts by its part.
    for column in _SERIES[1:]:
        value = float((np.diff(samples[column]) * inside).sum())
        found[names.get(column, column)] = value / 1e6 if column in names else value
    # Samples lie apart; of steps that all fit between two of them the rates still hold.
    share = float((inside * np.diff(times)).sum()) / max(total(*windows), 1)
    if share < 1.0:
        for key in ("user_s", "system_s", *_SERIES[3:]):
            found[key] /= share
    during = inside > 0.5
    found["resident_peak_B"] = 1024.0 * float(samples["resident_kB"][1:][during].max(initial=0.0))
    return found | _places(trace.process, samples["place"][1:][during])


def _samples(trace: Trace) -> dict[str, np.ndarray] | None:
    """The recorder's series by column, times in nanoseconds since 1970; None without one that makes sense."""
    process = trace.process
    columns, rows, start = process.get("columns"), process.get("series"), process.get("start_ns")
    wanted = (*_SERIES, "resident_kB", "place")
    if not isinstance(columns, list) or not isinstance(rows, list) or not isinstance(start, int):
        return None
    try:
        table = np.array(rows, np.float64)
        found = {name: table[:, columns.index(name)] for name in wanted}
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    if (
        len(table) < 2
        or not 0 <= start < 1 << 62
        or not np.isfinite(table).all()
        or (np.abs(table) > 2.0**53).any()
    ):
        return None
    if (np.diff(found["time_ns"]) <= 0).any():
        return None
    return found | {"time_ns": found["time_ns"].astype(np.int64) + start}


def _places(process: Process, stood: np.ndarray) -> dict[str, Any]:
    listed = process.get("places")
    if not isinstance(listed, list):
        return {}
    counts = Counter(int(place) for place in stood.tolist())
    chosen = [
        [*listed[place][:2], count]
        for place, count in counts.most_common()
        if 0 <= place < len(listed) and isinstance(listed[place], list)
    ]
    return {"samples": len(stood), "places": chosen}


def cpu_ns(process: Process, whole: int, steps: int) -> float:
    """CPU nanoseconds of so many steps that took ``whole`` nanoseconds: on a busy machine a job has only a
    part of a core. By the steps that were counted without a profiler, else by the CPU seconds over the
    seconds (at most 1), else all of it."""
    wall, user, system, counted_steps = (
        number(process.get(key)) for key in ("wall_s", "user_s", "system_s", "steps")
    )
    if not wall or user is None or system is None:
        return float(whole)
    if counted_steps and steps and user + system > 0:
        return (user + system) / counted_steps * steps * 1e9
    return whole * min(1.0, max(0.01, (user + system) / wall))


def counted(traces: Sequence[Trace], processes: Sequence[Process]) -> dict[str, Any]:
    """The figures of ``Facts`` that all ranks' processes give, by name; empty where one lacks some."""

    def sum_of(key: str) -> float:
        values = [number(process.get(key)) for process in processes]
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
        found |= dict(zip(("threads", "cores"), _fullest_host(traces, processes), strict=True))
    except KeyError:
        return {}
    return found | {"load": number(processes[0].get("load_average"))} | _memory(traces, processes)


def _fullest_host(traces: Sequence[Trace], processes: Sequence[Process]) -> tuple[int, int]:
    """(threads, cores) of the host whose ranks together have the most threads for a core."""
    threads: dict[str, int] = {}
    cores: dict[str, int] = {}
    for trace, process in zip(traces, processes, strict=True):
        host = trace.facts.get("host", "")
        threads[host] = threads.get(host, 0) + int(process["compute_threads"])
        cores[host] = max(cores.get(host, 1), int(process["cores"]))
    fullest = max(threads, key=lambda host: threads[host] / cores[host])
    return threads[fullest], cores[fullest]


def _memory(traces: Sequence[Trace], processes: Sequence[Process]) -> dict[str, Any]:
    """Of the rank that fills its limit most: what it allocates at its peak, and of how much room. Without
    samples of memory in the trace it is what the process grew by. A job on a device has its tensors there,
    and the host's memory says nothing of it."""
    found: dict[str, Any] = {}
    for trace, process in zip(traces, processes, strict=True):
        limit, used = (number(process.get(key)) for key in ("memory_limit_B", "in_use_at_start_B"))
        if limit is None or used is None or trace.on_device().any():
            continue
        allocated = trace.memory.allocated[trace.memory.device < 0]
        if len(allocated):
            taken = float(allocated.max() - allocated.min())
        else:
            taken = max(0.0, (number(process.get("resident_peak_B")) or 0.0) - used)
        share = taken / (limit - used) if limit > used else 1.0  # over its limit there is no room at all
        if share > found.get("memory", 0.0):
            found = {"memory": share, "memory_B": taken, "memory_limit_B": limit}
            found["memory_grown"] = not len(allocated)
    return found


def places(process: Process) -> str:
    """Where the program's own code stood most often: "load (data.py:7) 61 %, step (train.py:30) 12 %"."""
    listed, samples = process.get("places"), number(process.get("samples"))
    if not isinstance(listed, list) or not samples:
        return ""
    found = []
    for place in listed[:2]:
        if isinstance(place, list) and len(place) == 3 and isinstance(place[0], str):
            found.append(f"{place[0]} {100 * (number(place[2]) or 0.0) / samples:.0f} %")
    return ", ".join(found)
