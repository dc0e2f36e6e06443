"""XLA's ``xplane.pb``, as ``jax.profiler.trace`` writes it, through ``jax.profiler.ProfileData``.

A plane is a process or a device, a line a thread or a stream. JAX is imported only for such a file. Its
parser is C++; before it sees the file, the outermost layer of the protocol buffer is checked here.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from bench.traces.classify import classify_jax, classify_jax_device
from bench.traces.events import Kind, Lane, Memory, Trace
from bench.traces.readers.columns import LONGEST_NS, Columns, integer
from bench.traces.readers.source import Source, memory_budget
from bench.traces.recognise import is_xplane

_COST = 20  # bytes of memory for each byte of the file while it is decoded
_DEVICE = re.compile(r"/device:[A-Z_]+:(\d+)")
_ON_DEVICE = "device line: "


def read(source: Source) -> Trace:
    """ValueError: no xplane (which byte)."""
    data = source.rest(memory_budget() // _COST)
    if not is_xplane(data):
        raise source.broken("an XSpace was expected (the protocol buffer of XLA's profiler)", 0)
    try:
        from jax.profiler import ProfileData
    except ImportError as error:
        raise ValueError(f"{source.path} is read by jax.profiler, and JAX is not there: {error}") from None
    columns = Columns(source.path)
    lanes: list[Lane] = []
    facts: dict[str, str] = {}
    start = 0
    memory: list[tuple[float, int, int]] = []
    try:
        for plane in ProfileData.from_serialized_xspace(data).planes:
            name = str(plane.name)
            stats = {str(key): value for key, value in plane.stats}
            start = integer(stats.get("profile_start_time"), start)
            _note(facts, name, stats)
            device = _DEVICE.match(name)
            for line in plane.lines:
                lane = Lane(name, str(line.name), min(int(device[1]), 1 << 20) if device else -1)
                _add_line(columns, line, lane, len(lanes), memory)
                lanes.append(lane)
    except (RuntimeError, UnicodeError, TypeError, OverflowError) as error:
        raise ValueError(f"{source.path} is a damaged xplane: {error}") from None
    events, origin = columns.finish(_recognise)
    return Trace(
        source=source.path,
        format="jax",
        events=events,
        names=columns.used_names,
        lanes=lanes,
        memory=_memory(memory, origin),
        origin_ns=start + origin if start > 0 else 0,
        dropped=columns.dropped,
        unclassified=columns.unclassified,
        facts=facts,
    )


def _recognise(category: str, name: str) -> Kind:
    if category.startswith(_ON_DEVICE):
        return classify_jax_device(category.removeprefix(_ON_DEVICE), name)
    return classify_jax(category, name)


def _add_line(
    columns: Columns, line: Any, lane: Lane, code: int, memory: list[tuple[float, int, int]]
) -> None:
    start, duration, names, categories, calls = [], [], [], [], []
    for event in line.events:
        begin, length, name = event.start_ns, event.duration_ns, str(event.name)
        if not (0 <= length < LONGEST_NS and abs(begin) < LONGEST_NS):
            columns.dropped["slices without a valid start or duration"] += 1
            continue
        stats = {str(key): value for key, value in event.stats}
        if length == 0 and name in ("MemoryAllocation", "MemoryDeallocation"):
            memory.append((begin, integer(stats.get("bytes_allocated"), 0), max(lane.device, -1)))
            continue
        category = "step_num" if "step_num" in stats else "hlo_op" if "hlo_op" in stats else ""
        if lane.on_device:
            category = _ON_DEVICE + lane.thread
        start.append(begin)
        duration.append(length)
        names.append(columns.names[name])
        categories.append(columns.categories[category])
        calls.append(integer(stats.get("correlation_id")))
    if start:
        columns.add(
            start=np.rint(start).astype(np.int64),
            duration=np.rint(duration).astype(np.int64),
            name=np.array(names, np.int32),
            category=np.array(categories, np.int32),
            lane=np.full(len(start), code, np.int32),
            correlation=np.array(calls, np.int64),
        )


def _memory(samples: list[tuple[float, int, int]], origin: int) -> Memory:
    if not samples:
        return Memory.empty()
    when, allocated, device = zip(*sorted(samples), strict=True)
    return Memory(
        np.rint(when).astype(np.int64) - origin, np.array(allocated, np.int64), np.array(device, np.int32)
    )


def _note(facts: dict[str, str], plane: str, stats: dict[str, Any]) -> None:
    if plane.startswith("/device:") and "device_vendor" in stats and "device" not in facts:
        cores = f", {stats['core_count']} cores" if "core_count" in stats else ""
        facts["device"] = f"{stats['device_vendor']} {plane.removeprefix('/device:')}{cores}"
    if "jax_version" in stats:
        facts["JAX"] = str(stats["jax_version"])
