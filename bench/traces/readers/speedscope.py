"""speedscope's JSON, as py-spy, rbspy and others write it.

Schema: https://www.speedscope.app/file-format-schema.json. A sampled profile has stacks and how long each was
seen: a frame that stays on the stack from one sample to the next is one slice. An evented profile has the
opening and closing of frames. Each profile is a thread.

What counts no time (allocated bytes, samples without a length) nests all the same, and keeps its unit. Of a
file that holds both only the profiles of time are read.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from bench.traces.classify import classify_python
from bench.traces.events import Lane, Trace
from bench.traces.readers.columns import LONGEST_NS, Columns
from bench.traces.readers.source import Source, memory_budget

_NANOSECONDS = {
    "nanoseconds": 1.0,
    "microseconds": 1e3,
    "milliseconds": 1e6,
    "seconds": 1e9,
}
_COST = 8  # bytes of memory for each byte of JSON while it is decoded


class _Frame(Struct, gc=False):
    name: str
    file: str | None = None
    line: float | None = None


class _Shared(Struct, gc=False):
    frames: list[_Frame]


class _Mark(Struct, gc=False):
    type: str
    frame: int
    at: float


class _Profile(Struct, gc=False):
    type: str
    name: str = ""
    unit: str = "none"
    samples: list[list[int]] = []
    weights: list[float] = []
    events: list[_Mark] = []
    startValue: float = 0.0


class _File(Struct, gc=False):
    shared: _Shared
    profiles: list[_Profile]
    exporter: str | None = None
    name: str | None = None


def read(source: Source) -> Trace:
    """ValueError: no JSON (which byte), or not as speedscope's schema wants it (which field)."""
    try:
        file = msgspec.json.decode(source.rest(memory_budget() // _COST), type=_File)
    except RecursionError:
        raise ValueError(f"{source.path}: brackets are nested more deeply than in any report") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{source.path} is not speedscope's JSON: {error}") from None
    columns = Columns(source.path)
    lanes: list[Lane] = []
    trace = Trace(source.path, "speedscope", columns.finish()[0], [], [])
    profiles, trace.unit = _of_one_unit(file.profiles, columns)
    if trace.unit:
        trace.timed = False
        trace.notes.append(f"it counts in {trace.unit!r}, which is no time")
    first = min((_nanoseconds(profile, profile.startValue) for profile in profiles), default=0.0)
    for profile in profiles:
        # Threads begin at different times: all are counted from the beginning of the first.
        late = (_nanoseconds(profile, profile.startValue) - first) / _nanoseconds(profile, 1.0)
        marks = _of_samples(profile, columns) if profile.type == "sampled" else _of_events(profile, columns)
        marks = [(frame, begin + late, end + late) for frame, begin, end in marks]
        _add(columns, file.shared.frames, marks, _nanoseconds(profile, 1.0), len(lanes))
        lanes.append(Lane(file.name or "process", profile.name or f"thread {len(lanes)}"))
    trace.events, _ = columns.finish(classify_python)
    trace.names, trace.lanes, trace.dropped = columns.used_names, lanes, columns.dropped
    if file.exporter:
        trace.facts["recorded by"] = file.exporter
    return trace


def _nanoseconds(profile: _Profile, value: float) -> float:
    """A value of a profile; where it counts no time, as it is."""
    return value * _NANOSECONDS.get(profile.unit, 1.0)


def _of_one_unit(profiles: list[_Profile], columns: Columns) -> tuple[list[_Profile], str]:
    """Those that count time, and "" for their unit; without any those of the first one's unit, and that."""
    timed = [profile for profile in profiles if profile.unit in _NANOSECONDS]
    unit = "" if timed or not profiles else profiles[0].unit or "none"
    kept = timed or [profile for profile in profiles if (profile.unit or "none") == unit]
    if len(kept) < len(profiles):
        what = f"in {unit!r}" if unit else "time"
        columns.dropped[f"profiles in another unit, beside others that count {what}"] += len(profiles) - len(
            kept
        )
    return kept, unit


Slice = tuple[int, float, float]


def _of_samples(profile: _Profile, columns: Columns) -> list[Slice]:
    """(frame, start, end) of the frames that stay on the stack, from the profile's own beginning."""
    if len(profile.weights) != len(profile.samples):
        columns.dropped["samples without a weight"] += abs(len(profile.samples) - len(profile.weights))
    slices: list[Slice] = []
    stack: list[tuple[int, float]] = []
    now = 0.0
    for frames, weight in zip(profile.samples, profile.weights, strict=False):
        if not weight >= 0:
            columns.dropped["samples of negative weight"] += 1
            continue
        same = 0
        while same < min(len(stack), len(frames)) and stack[same][0] == frames[same]:
            same += 1
        while len(stack) > same:
            slices.append((*stack.pop(), now))
        stack += [(frame, now) for frame in frames[same:]]
        now += weight
    slices += [(*opened, now) for opened in stack]
    return slices


def _of_events(profile: _Profile, columns: Columns) -> list[Slice]:
    slices: list[Slice] = []
    stack: list[tuple[int, float]] = []
    for mark in profile.events:
        if mark.type == "O":
            stack.append((mark.frame, mark.at - profile.startValue))
        elif stack and stack[-1][0] == mark.frame:
            slices.append((*stack.pop(), mark.at - profile.startValue))
        else:
            columns.dropped["ends of slices that have no beginning"] += 1
    if stack:
        columns.dropped["slices without an end"] += len(stack)
    return slices


def _add(columns: Columns, frames: list[_Frame], slices: list[Slice], scale: float, lane: int) -> None:
    known = [s for s in slices if 0 <= s[0] < len(frames)]
    good = [s for s in known if s[2] >= s[1] and max(abs(s[1]), abs(s[2])) * scale < LONGEST_NS]
    if len(known) < len(slices):
        columns.dropped["frames that are in no table"] += len(slices) - len(known)
    if len(good) < len(known):
        columns.dropped["slices of negative or endless duration"] += len(known) - len(good)
    if not good:
        return
    frame, begin, end = (np.array(values) for values in zip(*good, strict=True))
    start, stop = np.rint(begin * scale).astype(np.int64), np.rint(end * scale).astype(np.int64)
    labels = [_label(frames[index]) for index in frame.tolist()]
    columns.add(
        start=start,
        duration=stop - start,
        name=np.array([columns.names[label] for label in labels], np.int32),
        lane=np.full(len(good), lane, np.int32),
    )


def _label(frame: _Frame) -> str:
    if not frame.file:
        return frame.name
    line: Any = "" if frame.line is None else f":{frame.line:g}"
    return f"{frame.name} ({frame.file}{line})"
