"""A Chrome trace as a ``Trace``, whoever wrote it."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.profile.process import KEY
from bench.traces.classify import classify, classify_jax, classify_jax_device, classify_python
from bench.traces.events import Trace, distinct
from bench.traces.flops import count_flops
from bench.traces.readers.chrome import ChromeColumns
from bench.traces.readers.chrome_event import printable
from bench.traces.readers.chrome_stream import ChromeStream
from bench.traces.readers.columns import integer
from bench.traces.readers.source import Source

EPOCH_NS = 1_000_000_000_000_000_000  # September 2001: a time above it counts from 1970
MOST_RANKS = 1 << 20
_KINETO_KEYS = frozenset(("schemaVersion", "deviceProperties", "distributedInfo", "traceName", "trace_id"))
_KINETO_CATEGORIES = frozenset(("cpu_op", "kernel", "cuda_runtime", "user_annotation", "operator", "runtime"))
_RECOGNISE = {
    "kineto": classify,
    "jax": classify_jax,
    "viztracer": classify_python,
    "py-spy": classify_python,
}
_FACTS = {
    "host_name": "host",
    "cuda_runtime_version": "CUDA runtime",
    "hip_runtime_version": "HIP runtime",
    "cuda_driver_version": "CUDA driver",
    "hip_driver_version": "HIP driver",
}


def read(source: Source) -> Trace:
    """ValueError: what is wrong with the file, and at which byte."""
    stream, table = ChromeStream(source), ChromeColumns(source.path)
    for part in stream:
        table.add(part)
        del part  # its memory serves the next one
    document, columns = stream.document, table.columns
    written_by = _written_by(document, table)
    recognise = _RECOGNISE.get(written_by, classify)
    events, lanes, origin = table.finish(recognise, left_out=("Trace",) if written_by == "kineto" else ())
    base = integer(document.get("baseTimeNanoseconds"), 0)
    info = document.get("distributedInfo")
    info = info if isinstance(info, dict) else {}
    trace = Trace(
        source=source.path,
        format=written_by,
        events=events,
        names=columns.used_names,
        lanes=lanes,
        shapes=[_shape_text(shape) for shape in columns.shapes],
        groups=[_group_text(*group) for group in columns.groups],
        memory=table.memory(origin),
        origin_ns=base + origin if base or origin > EPOCH_NS else 0,
        rank=_of_ranks(info.get("rank")),
        world_size=_of_ranks(info.get("world_size")),
        backend=printable(str(info.get("backend", ""))),
        dropped=stream.dropped + columns.dropped,
        unclassified=columns.unclassified,
        notes=stream.notes,
        facts=_facts(document),
        process=recorded if isinstance(recorded := document.get(KEY), dict) else {},
        product_ns=dict(table.product_ns),
    )
    count_flops(trace)
    if written_by == "jax":
        _place_on_devices(trace)
    if any(name.startswith("shm:") for name in trace.names):
        from bench.traces.readers.shm_ranges import place_ranges

        place_ranges(trace)
    return trace


def _of_ranks(value: Any) -> int:
    """A rank, or a number of ranks; -1 for what can be none."""
    found = integer(value)
    return found if 0 <= found <= MOST_RANKS else -1


def _written_by(document: dict[str, Any], table: ChromeColumns) -> str:
    categories = {str(category).lower() for category in table.columns.categories}
    if "viztracer_metadata" in document:
        return "viztracer"
    if _KINETO_KEYS & set(document) or _KINETO_CATEGORIES & categories:
        return "kineto"
    if categories == {"py-spy"}:
        return "py-spy"
    return "jax" if table.labels.of_jax() else "chrome"


def _place_on_devices(trace: Trace) -> None:
    """JAX's file does not say what a slice of a device is; its line and its name do."""
    events = trace.events
    for lane, label in enumerate(trace.lanes):
        if label.on_device:
            rows = np.flatnonzero(events.lane == lane)
            for name in distinct(events.name[rows]).tolist():
                kind = classify_jax_device(label.thread, trace.names[name])
                events.kind[rows[events.name[rows] == name]] = kind


def _shape_text(shape: bytes) -> str:
    return shape.decode("utf-8", "replace").replace(" ", "").replace("\n", "").replace(",", ", ")


def _group_text(name: str, description: str, size: int) -> str:
    label = f"{name} ({description})" if description not in ("", "undefined") else name
    return f"{label} of {size}" if size else label


def _facts(document: dict[str, Any]) -> dict[str, str]:
    facts = {label: printable(str(document[key])) for key, label in _FACTS.items() if key in document}
    devices = document.get("deviceProperties")
    names = (
        [printable(str(d["name"])) for d in devices if isinstance(d, dict) and "name" in d]
        if isinstance(devices, list)
        else []
    )
    if names:
        facts = {"device": names[0], "devices": str(len(names)), **facts}
    return facts
