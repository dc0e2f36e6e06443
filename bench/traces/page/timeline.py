"""The columns of the page's timeline: which slices are drawn, on which row of which lane.

Slices of one row are disjoint and sorted, so that the page finds those in view by bisection. A slice stands
one row below the one that encloses it; those that overlap a neighbour without being inside it (collectives of
one thread may cross) get rows of their own below.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.report.units import text_of
from bench.traces.events import Events, Kind, Trace, distinct
from bench.traces.page.packing import Words, pack, pack_signed
from bench.traces.steps import steps
from bench.traces.tree import ROUNDING_NS, launched_by, parents

MOST_SLICES = 250_000  # on one page: about 3.5 MB
MOST_LANES = 600  # of one rank
MOST_ROWS = 300  # of one lane
MOST_STEPS = 5_000  # of one rank: marks above its lanes
_CROSSING_ROWS = 24  # of one lane, for slices that overlap their neighbours
Clock = Callable[[np.ndarray], np.ndarray]
"""int64 nanoseconds of a trace -> int64 nanoseconds of the time that all traces share."""

_FAR = 2**50  # nanoseconds, 13 days: beyond that from the others a time is taken to be damaged


@dataclass(frozen=True)
class Timeline:
    """What the script draws: ``data`` is plain JSON. left_out: slices that are not in it and why, counted."""

    data: dict[str, Any]
    slices: int
    left_out: Counter[str]


def timeline(
    traces: Sequence[Trace],
    clocks: Sequence[Clock],
    titles: Sequence[str],
    words: Words,
    most: int = MOST_SLICES,
) -> Timeline:
    """The timeline of timed traces, each with its clock and its title ("rank 3", or "" for the only one).

    Of more than ``most`` slices the shortest are left out first.
    """
    left_out: Counter[str] = Counter()
    masks = _near(traces, clocks, left_out)
    _longest(traces, masks, most, left_out)
    placed = [_placed(trace, mask, left_out) for trace, mask in zip(traces, masks, strict=True)]
    starts = [clock(trace.events.start) for trace, clock in zip(traces, clocks, strict=True)]
    base = min(
        (int(start[mask].min()) for start, mask in zip(starts, masks, strict=True) if mask.any()), default=0
    )
    parts, groups, before = [], [], 0
    for trace, clock, title, (rows, row) in zip(traces, clocks, titles, placed, strict=True):
        parts.append(_columns(trace, rows, clock(trace.events.start[rows]) - base, words, before))
        if more := max(0, len(steps(trace)) - MOST_STEPS):
            left_out["marks of steps above the lanes"] += more
        groups.append({"name": text_of(title[:80], 60), **_group(trace, rows, row, clock, base, words)})
        before += len(rows)
    columns = {
        name: np.concatenate([part[name] for part in parts]) if parts else np.empty(0, np.int64)
        for name in ("start", "duration", "name", "kind", "shape", "bytes", "launch")
    }
    start = columns.pop("start")
    data = {
        "groups": groups,
        "kinds": [kind.name.lower() for kind in Kind],
        "start": pack_signed(np.diff(start, prepend=0)),
        **{name: pack(values) for name, values in columns.items()},
    }
    return Timeline(data, before, left_out)


def rows_of(events: Events, parent: np.ndarray) -> np.ndarray:
    """int32 (rows,): on which row of its lane each slice stands, 0 at the top; -1 where there is no room.

    parent: the row of the enclosing slice, -1 at the top (``tree.parents``). Slices of one row of one lane
    never overlap by more than profilers round.
    """
    row = (parent >= 0).astype(np.int32)
    above = parent
    # Each round doubles how far up a slice has counted: a stack of a million takes twenty.
    while (inside := np.flatnonzero(above >= 0)).size:
        row[inside] += row[above[inside]]
        above = above.copy()
        above[inside] = above[above[inside]]
    order = np.lexsort((events.start, row, events.lane))
    group = np.cumsum(
        np.r_[0, (np.diff(events.lane[order]) != 0) | (np.diff(row[order]) != 0)] if len(order) else []
    )
    # Overlap: a slice begins before an earlier one of the same row of the same lane ended.
    start, end = events.start[order], events.end[order]
    latest = np.empty_like(end)
    for first, last in _runs(group):
        latest[first:last] = np.maximum.accumulate(end[first:last])
    crossing = np.zeros(len(order), bool)
    crossing[1:] = (np.diff(group) == 0) & (start[1:] < latest[:-1] - ROUNDING_NS)
    _move_down(events, row, np.sort(order[crossing]))
    row[row >= MOST_ROWS] = -1
    return row


def _runs(codes: np.ndarray) -> list[tuple[int, int]]:
    """[first, last) of each stretch of equal codes (from 0 on)."""
    bounds = [*np.flatnonzero(np.diff(codes, prepend=-1)).tolist(), len(codes)]
    return list(itertools.pairwise(bounds))


def _move_down(events: Events, row: np.ndarray, rows: np.ndarray) -> None:
    """Each of these goes to the first row below all others of its lane where nothing overlaps it."""
    stays = np.ones(len(row), bool)
    stays[rows] = False
    lowest = np.zeros(int(events.lane.max(initial=0)) + 1, np.int64)
    np.maximum.at(lowest, events.lane[stays], row[stays] + 1)
    ends: dict[int, list[int]] = {}
    order = rows[np.lexsort((events.start[rows], events.lane[rows]))]
    for index in order.tolist():
        lane, start, end = int(events.lane[index]), int(events.start[index]), int(events.end[index])
        taken = ends.setdefault(lane, [])
        place = next((i for i, last in enumerate(taken) if last - ROUNDING_NS <= start), len(taken))
        if place == len(taken):
            if place == _CROSSING_ROWS:
                row[index] = -1
                continue
            taken.append(end)
        taken[place] = end
        row[index] = int(lowest[lane]) + place


def _near(traces: Sequence[Trace], clocks: Sequence[Clock], left_out: Counter[str]) -> list[np.ndarray]:
    """Masks of slices whose times are not absurdly far from the others' (a damaged file's would be)."""
    # In float64: a damaged file's times overflow 64 bits when something is added to them.
    shifts = [float(clock(np.zeros(1, np.int64))[0]) for clock in clocks]
    times = [trace.events.start + shift for trace, shift in zip(traces, shifts, strict=True)]
    every = np.concatenate(times) if times else np.empty(0)
    centre = float(np.median(every)) if len(every) else 0.0
    masks = [
        (np.abs(time - centre) < _FAR) & (trace.events.duration < _FAR)
        for time, trace in zip(times, traces, strict=True)
    ]
    if far := sum(int((~mask).sum()) for mask in masks):
        left_out["slices more than 13 days from most others"] = far
    return masks


def _longest(traces: Sequence[Trace], masks: list[np.ndarray], most: int, left_out: Counter[str]) -> None:
    """Takes the shortest slices out of the masks until ``most`` are left."""
    lengths = np.concatenate([trace.events.duration[mask] for trace, mask in zip(traces, masks, strict=True)])
    if len(lengths) <= most:
        return
    kept = np.zeros(len(lengths), bool)
    # Stable: of equal lengths the earlier row stays, and so does a parent before its children.
    kept[np.argsort(-lengths, kind="stable")[:most]] = True
    left_out[f"shortest slices, none above {lengths[~kept].max() / 1000:.3g} us"] = int((~kept).sum())
    before = 0
    for mask in masks:
        rows = np.flatnonzero(mask)
        mask[rows[~kept[before : before + len(rows)]]] = False
        before += len(rows)


def _placed(trace: Trace, mask: np.ndarray, left_out: Counter[str]) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the slices that are drawn, by lane, row and start, and the row of each."""
    events = trace.events.select(mask)
    row = rows_of(events, parents(events))
    rows = np.flatnonzero(mask)
    if lost := int((row < 0).sum()):
        left_out[f"slices below the first {MOST_ROWS} rows of their lane, or across others there"] += lost
    lane = _lane_order(trace)[events.lane]
    if crowded := int(((row >= 0) & (lane >= MOST_LANES)).sum()):
        left_out[f"slices of all but {MOST_LANES} lanes"] += crowded
    order = np.lexsort((events.start, row, lane))
    order = order[(row[order] >= 0) & (lane[order] < MOST_LANES)]
    return rows[order], row[order]


def _lane_order(trace: Trace) -> np.ndarray:
    """int64 (lanes,): devices first (what everybody waits for), then threads, the busiest on top."""
    busy = np.bincount(trace.events.lane, trace.events.duration.astype(np.float64), len(trace.lanes))
    device = np.array([lane.device if lane.on_device else np.iinfo(np.int64).max for lane in trace.lanes])
    rank = np.empty(len(trace.lanes), np.int64)
    rank[np.lexsort((-busy, device))] = np.arange(len(trace.lanes))
    return rank


def _columns(
    trace: Trace, rows: np.ndarray, start: np.ndarray, words: Words, before: int
) -> dict[str, np.ndarray]:
    """The columns of one trace in the order they are drawn; what may be missing is one higher, 0 missing."""
    events = trace.events
    # Where each of the trace's slices stands on the page, one higher; 0: it is not drawn.
    place = np.zeros(len(events) + 1, np.int64)
    place[rows] = before + 1 + np.arange(len(rows))
    names = np.zeros(len(trace.names), np.int64)
    for code in distinct(events.name[rows]).tolist():
        names[code] = words.number(trace.names[code])
    shapes = np.r_[words.numbers(trace.shapes) + 1, 0]  # the last one is for -1
    return {
        "start": start,
        "duration": events.duration[rows],
        "name": names[events.name[rows]],
        "kind": events.kind[rows].astype(np.int64),
        "shape": shapes[events.shape[rows]],
        "bytes": np.clip(events.bytes[rows], -1, _FAR) + 1,
        "launch": place[launched_by(events)[rows]],
    }


def _group(
    trace: Trace, rows: np.ndarray, row: np.ndarray, clock: Clock, base: int, words: Words
) -> dict[str, Any]:
    """A rank of the timeline: its lanes with the number of slices in each row, and its steps."""
    lanes = []
    lane = trace.events.lane[rows]
    processes = {item.process for item in trace.lanes}
    for first, last in _runs(lane):
        item = trace.lanes[lane[first]]
        label = f"{item.process} · {item.thread}" if len(processes) > 1 else item.thread
        if item.on_device:
            label = f"device {item.device} · {item.thread}"
        counts = np.bincount(row[first:last]).tolist()
        lanes.append({"name": text_of(label[:200], 120), "device": item.on_device, "rows": counts})
    return {"lanes": lanes, "steps": _steps(trace, clock, base, words)}


def _steps(trace: Trace, clock: Clock, base: int, words: Words) -> list[list[int]]:
    """[number of the name, start, end] of each step, from the base."""
    found = steps(trace)
    if not found.given:
        return []
    windows = zip(
        found.names[:MOST_STEPS],
        clock(found.start[:MOST_STEPS]) - base,
        clock(found.end[:MOST_STEPS]) - base,
        strict=True,
    )
    # A damaged time would stretch the timeline to where nobody finds anything.
    return [
        [words.number(name), int(start), int(end)]
        for name, start, end in windows
        if -_FAR < start <= end < _FAR
    ]
