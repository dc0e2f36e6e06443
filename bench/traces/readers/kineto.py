"""PyTorch's Chrome traces (Kineto)."""

from __future__ import annotations

import gc
import re
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bench.traces.classify import DEVICE_CATEGORIES, classify
from bench.traces.events import Events, Kind, Lane, Memory, Trace


class Event(msgspec.Struct, gc=False):
    ph: str = ""
    name: str = ""
    cat: str | None = None
    ts: float | int | None = None
    dur: float | int | None = None
    pid: int | str | None = None
    tid: int | str | None = None
    args: dict[str, Any] = {}


class Document(msgspec.Struct):
    traceEvents: list[Event]
    distributedInfo: dict[str, Any] = {}
    baseTimeNanoseconds: int = 0
    deviceProperties: list[dict[str, Any]] = []


def nanoseconds(value: float) -> int:
    whole = int(value // 1)
    return whole * 1000 + round((value - whole) * 1000)


def read(path: Path) -> Trace:
    from isal import igzip

    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        raw = igzip.decompress(raw)
    gc.disable()
    try:
        document = msgspec.json.decode(raw, type=Document)
    finally:
        gc.enable()
    process = {e.pid: str(e.args.get("name", "")) for e in document.traceEvents if e.name == "process_name"}
    thread = {(e.pid, str(e.tid)): str(e.args.get("name", "")) for e in document.traceEvents if e.name == "thread_name"}
    rows = [e for e in document.traceEvents if e.ph == "X" and e.ts is not None and e.cat != "Trace"]
    dropped = Counter({"other events": len(document.traceEvents) - len(rows)})
    origin = min((nanoseconds(e.ts or 0) for e in rows), default=0)
    names: dict[str, int] = {}
    lanes: dict[tuple[Any, str], int] = {}
    labels: list[Lane] = []
    shapes: dict[str, int] = {}
    columns: dict[str, list[float]] = {key: [] for key in Events.DTYPES if key not in ("calls", "flops", "group")}
    for e in rows:
        key = (e.pid, str(e.tid))
        if key not in lanes:
            lanes[key] = len(lanes)
            device = -1
            if (e.cat or "").lower() in DEVICE_CATEGORIES:
                device = int(e.args.get("device", e.pid if isinstance(e.pid, int) else 0))
            label = thread.get(key) or (f"stream {e.tid}" if device >= 0 else f"thread {e.tid}")
            labels.append(Lane(f"{process.get(e.pid, '')} {e.pid}", label.strip(), device))
        shape = str(e.args.get("Input Dims", ""))
        columns["start"].append(nanoseconds(e.ts or 0) - origin)
        columns["duration"].append(max(0, nanoseconds(e.dur or 0)))
        columns["name"].append(names.setdefault(e.name, len(names)))
        columns["kind"].append(classify(e.cat or "", e.name))
        columns["lane"].append(lanes[key])
        columns["correlation"].append(int(e.args.get("correlation", -1)))
        columns["shape"].append(shapes.setdefault(shape, len(shapes)) if shape else -1)
        columns["bytes"].append(int(e.args.get("bytes", -1)))
    samples = [e for e in document.traceEvents if e.name == "[memory]" and "Total Allocated" in e.args]
    info = document.distributedInfo
    number = re.search(r"rank[-_]?(\d+)", path.name)
    return Trace(
        source=str(path),
        format="kineto",
        events=Events.of(**columns),
        names=list(names),
        lanes=labels,
        shapes=list(shapes),
        memory=Memory(
            np.array([nanoseconds(e.ts or 0) - origin for e in samples], np.int64),
            np.array([e.args["Total Allocated"] for e in samples], np.int64),
            np.array([e.args.get("Device Id", -1) for e in samples], np.int32),
        ),
        origin_ns=document.baseTimeNanoseconds + origin if document.baseTimeNanoseconds or origin > 10**18 else 0,
        rank=int(info.get("rank", number[1] if number else -1)),
        world_size=int(info.get("world_size", -1)),
        backend=str(info.get("backend", "")),
        dropped=dropped,
        unclassified=Counter(e.cat or e.name for e in rows if classify(e.cat or "", e.name) == Kind.UNCLASSIFIED),
        facts={"device": str(p.get("name", "")) for p in document.deviceProperties[:1]},
    )
