"""The ranges that ``parallel.shm`` records of its operations, in the shape of gloo's.

A backend in Python can only mark a range on the thread that calls it, from the call to the end, and has only
the range's name to say what is moved: ``shm:all_reduce(4000 bytes, group 0 of 2)``. Here this becomes what
gloo records on threads of its own: ``shm:all_reduce`` with its bytes and its group on a lane of the backend.
There what is called while another collective of the group is under way begins when that one ends: a group
does one after the other. Messages have a lane of their own, since they wait for nothing but their peer.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from msgspec.structs import replace

from bench.traces.events import Events, Kind, Trace, distinct

_RANGE = re.compile(r"(shm:(\w{1,40}))\((\d{1,18}) bytes, group (.{1,200}) of (\d{1,9})\)")


def place_ranges(trace: Trace) -> None:
    """Changes the trace, where it has such ranges."""
    told = {code: found for code, name in enumerate(trace.names) if (found := _RANGE.fullmatch(name))}
    if not told:
        return
    columns = {name: getattr(trace.events, name) for name in Events.DTYPES}
    names, groups, lanes = Table(trace.names), Table(trace.groups), Table(trace.lanes)
    stop = trace.events.end
    for code, found in told.items():
        rows = np.flatnonzero((trace.events.name == code) & (trace.events.kind == Kind.COMMUNICATION))
        name, what, size, group, members = found.groups()
        columns["name"][rows] = names.code(name)
        columns["bytes"][rows] = int(size)
        columns["group"][rows] = groups.code(f"{group} of {members}")
        way = f" {what}s" if what in ("send", "recv") else ""
        for lane in distinct(columns["lane"][rows]).tolist():
            label = trace.lanes[lane]
            label = replace(label, thread=f"{label.thread}: shm{way}, group {group}")
            columns["lane"][rows[columns["lane"][rows] == lane]] = lanes.code(label)
    for lane in range(len(trace.lanes), len(lanes.symbols)):
        rows = np.flatnonzero(columns["lane"] == lane)
        rows = rows[np.argsort(columns["start"][rows], kind="stable")]
        start, end = columns["start"][rows], stop[rows]
        before = np.maximum.accumulate(np.append(start[:1], end[:-1]))
        start = np.minimum(np.maximum(start, before), end)
        columns["start"][rows], columns["duration"][rows] = start, end - start
    trace.names, trace.groups, trace.lanes = names.symbols, groups.symbols, lanes.symbols
    trace.events = Events.of(**columns)


class Table:
    """Symbols by their codes, to which new ones are added; of equal ones the last is found."""

    def __init__(self, symbols: list[Any]) -> None:
        self.symbols = list(symbols)
        self._codes = {symbol: code for code, symbol in enumerate(symbols)}

    def code(self, symbol: Any) -> int:
        if symbol not in self._codes:
            self._codes[symbol] = len(self.symbols)
            self.symbols.append(symbol)
        return self._codes[symbol]
