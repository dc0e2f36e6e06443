"""One Chrome trace of all ranks, which Perfetto opens: ranks labelled and in order, on one clock.

What is a number of its own file in every rank (processes, threads, flows, correlations) gets a number of its
own in the whole: joined as they are, the calls of one rank would launch the kernels of another.

Chrome traces are copied event by event from their files, arguments and all, a megabyte at a time; reports of
other formats are written from their tables. Nothing but the symbols is ever held whole.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from bench.traces.classify import category_of
from bench.traces.clocks import RankClock
from bench.traces.events import Events, Job, Kind, Trace
from bench.traces.ranks import Ranks
from bench.traces.readers.chrome_stream import ChromeStream
from bench.traces.readers.columns import integer, nanoseconds, number
from bench.traces.readers.source import Source

COPIED = ("kineto", "chrome", "viztracer", "py-spy")
"""Formats whose files are Chrome traces themselves; JAX's is one too where its name ends in json."""
ROWS = 10_000  # of a table, written at a time
_LOW_BITS = 40  # an id below 2**40 keeps its low bits: rank 3's flow 7 is 3 * 2**40 + 7
_ID_ARGUMENTS = ("correlation", "External id", "external id")
_DEVICES_FROM = 5_000_000  # Kineto's sort index of device 0


@dataclass
class Merged:
    """What was written. events: how many. left_out: what was not, counted; notes: what to know of it."""

    path: Path
    events: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def merge(job: Job, ranks: Ranks, path: Path) -> Merged:
    """Write all ranks that ``compare_ranks(job)`` compared into one file, zipped where its name ends in .gz.

    The file appears when it is whole. ValueError: no rank, or a report that cannot be read any more.
    """
    timed = [trace for trace in job.traces if trace.timed and len(trace.events)]
    traces: dict[int, Trace] = {}
    for trace in timed:
        traces.setdefault(trace.rank, trace)  # of two files of one rank the first, as everywhere
    chosen = [traces[rank] for rank in ranks.ranks if rank in traces]
    if len(chosen) < len(ranks.ranks):  # the reports do not say their ranks: they are in this order
        chosen = timed
    if not chosen:
        raise ValueError(f"{job.source}: there is no rank with places in time to merge")
    clocks = ranks.clocks or [RankClock() for _ in chosen]
    origin = ranks.matched.origin_ns if ranks.matched is not None else 0
    members = [
        _Member(place, rank, trace, clock, trace.origin_ns - origin if origin else 0)
        for place, (rank, trace, clock) in enumerate(zip(ranks.ranks, chosen, clocks, strict=True))
    ]
    zero = min(member.time(0) for member in members)
    merged = Merged(path)
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        with _opened(part, path.suffix == ".gz") as file:
            file.write(b'{"displayTimeUnit":"ms","traceEvents":[')
            numbers = _Numbers()
            for member in members:
                for events in member.events(numbers, zero, merged):
                    text = _ENCODER.encode(events)[1:-1]
                    file.write((b",\n" if merged.events else b"\n") + text if text else b"")
                    merged.events += len(events)
            about = {"baseTimeNanoseconds": origin + zero if origin else 0, "ranks": ranks.ranks}
            file.write(b"\n]," + msgspec.json.encode(about)[1:])
        os.replace(part, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)
    return merged


_ENCODER = msgspec.json.Encoder(decimal_format="number")


def _opened(path: Path, zipped: bool) -> BinaryIO:
    if not zipped:
        return open(path, "wb")
    from isal import igzip

    file: BinaryIO = igzip.open(path, "wb", compresslevel=2)
    return file


class _Whole(ChromeStream):
    """Events with all that they hold. Decimals stay as written: 1711964646123456.789 is no float64."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._many: Any = msgspec.json.Decoder(list[dict[str, Any]], float_hook=Decimal)
        self._one: Any = msgspec.json.Decoder(dict[str, Any], float_hook=Decimal)
        self._is_exact = True

    def _kept(self, data: Any) -> Any:
        if isinstance(data, dict):
            return data
        self.dropped["events that are no objects"] += 1
        return None


class _Numbers:
    """Numbers that are unique over all ranks, given in the order of asking."""

    def __init__(self) -> None:
        self._next = 1

    def new(self) -> int:
        self._next += 1
        return self._next - 1


class _Member:
    """One rank on its way into the merged trace. base: what turns its times into those of the clocks."""

    def __init__(self, place: int, rank: int, trace: Trace, clock: RankClock, base: int) -> None:
        self.place, self.rank, self.trace, self.clock, self.base = place, rank, trace, clock, base
        self.processes: dict[str, int] = {}
        self.threads: dict[tuple[str, str], int] = {}
        self.named: set[str] = set()
        self.ids: dict[str, int] = {}

    def time(self, nanoseconds: int) -> int:
        """A time of the rank's table on the clock of all."""
        return int(self.clock.correct(np.array([nanoseconds + self.base], np.int64))[0])

    def events(self, numbers: _Numbers, zero: int, merged: Merged) -> Iterator[list[dict[str, Any]]]:
        trace = self.trace
        copied = trace.format in COPIED or (trace.format == "jax" and ".json" in Path(trace.source).name)
        yield from (self._copied if copied else self._written)(numbers, zero, merged)
        unnamed = [key for key in self.processes if key not in self.named]
        yield [self._label(self.processes[key], key) for key in unnamed]

    def _label(self, pid: int, name: str) -> dict[str, Any]:
        text = f"rank {self.rank}: {name}" if self.rank >= 0 else name
        return {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": text}}

    def _pid(self, key: str, numbers: _Numbers, events: list[dict[str, Any]]) -> int:
        if key not in self.processes:
            pid = self.processes[key] = numbers.new()
            order = {"sort_index": self._order(0)}
            events.append({"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": order})
        return self.processes[key]

    def _tid(self, process: str, key: str, numbers: _Numbers, events: list[dict[str, Any]]) -> int:
        """Unique among all ranks: Perfetto takes threads of one number for one thread."""
        if (process, key) not in self.threads:
            self.threads[process, key] = tid = numbers.new()
            name = {"name": f"thread {key}"}
            pid = self.processes[process]
            events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": name})
        return self.threads[process, key]

    def _order(self, index: float) -> int:
        """All processes of a rank before those of the next; in it the host, its devices, then the rest."""
        within = index - _DEVICES_FROM + 1 if math.isfinite(index) else 0
        return self.place * 1000 + int(min(max(within, 0), 999))

    def _id(self, value: Any) -> int:
        found = integer(value)
        if not isinstance(value, int) or not 0 <= found < 1 << _LOW_BITS:
            # From the top down, where no small id is.
            found = self.ids.setdefault(str(value), (1 << _LOW_BITS) - 1 - len(self.ids))
        return self.place << _LOW_BITS | found

    # --- from the file -----------------------------------------------------------------------------

    def _copied(self, numbers: _Numbers, zero: int, merged: Merged) -> Iterator[list[dict[str, Any]]]:
        begun = self._first()
        with Source(self.trace.source) as source:
            stream: Any = _Whole(source)
            for events in stream:
                written: list[dict[str, Any]] = []
                for event in events:
                    self._move(event, numbers, lambda raw: self.time(raw - begun) - zero, written, merged)
                yield written
            merged.left_out += stream.dropped

    def _first(self) -> int:
        """The file's nanosecond that is 0 in the rank's table."""
        first: list[int] = []
        with Source(self.trace.source) as source:
            stream = ChromeStream(source)
            for events in stream:
                begun = [e.ts for e in events if e.ph in ("X", "B") and e.cat != "Trace"]
                times, valid = nanoseconds(begun)
                if valid.any():
                    first = [min([*first, int(times[valid].min())])]
        if self.trace.origin_ns:
            return self.trace.origin_ns - integer(stream.document.get("baseTimeNanoseconds"), 0)
        return first[0] if first else 0

    def _move(
        self,
        event: dict[str, Any],
        numbers: _Numbers,
        moved: Callable[[int], int],
        written: list[dict[str, Any]],
        merged: Merged,
    ) -> None:
        """Put the event, renumbered and on the clock of all, behind those that are written."""
        phase, arguments = event.get("ph"), event.get("args")
        process, thread = str(event.get("pid", "")), str(event.get("tid", ""))
        event["pid"] = self._pid(process, numbers, written)
        if phase != "M":
            raw = _nanoseconds(event.get("ts"))
            if raw is None:
                merged.left_out["events without a time"] += 1
                return
            event["ts"] = Decimal(moved(raw)) / 1000
            event["tid"] = self._tid(process, thread, numbers, written)
            for key in ("id", "bind_id"):
                if key in event:
                    event[key] = self._id(event[key])
        else:
            self._move_label(event, process, thread, arguments, numbers, written)
        if isinstance(arguments, dict):
            for key in _ID_ARGUMENTS:
                if isinstance(arguments.get(key), int):
                    arguments[key] = self._id(arguments[key])
        written.append(event)

    def _move_label(
        self,
        event: dict[str, Any],
        process: str,
        thread: str,
        arguments: Any,
        numbers: _Numbers,
        written: list[dict[str, Any]],
    ) -> None:
        event.pop("ts", None)
        if str(event.get("name", "")).startswith("thread_"):
            event["tid"] = self._tid(process, thread, numbers, written)
        elif "tid" in event:
            event["tid"] = 0
        if not isinstance(arguments, dict):
            return
        if event.get("name") == "process_name":
            self.named.add(process)
            event["args"] = self._label(0, str(arguments.get("name", process)))["args"]
        elif event.get("name") == "process_sort_index":
            arguments["sort_index"] = self._order(number(arguments.get("sort_index")))

    # --- from the table ----------------------------------------------------------------------------

    def _written(self, numbers: _Numbers, zero: int, merged: Merged) -> Iterator[list[dict[str, Any]]]:
        trace, table = self.trace, self.trace.events
        merged.notes.append(f"rank {self.rank}: written from its table; {trace.format} files hold more")
        places = []
        labels: list[dict[str, Any]] = []
        for lane in trace.lanes:
            pid = self._pid(lane.process, numbers, labels)
            tid = self._tid(lane.process, lane.thread, numbers, labels)
            labels[-1]["args"]["name"] = lane.thread
            places.append((pid, tid))
        yield labels
        for first in range(0, len(table), ROWS):
            part = table.select(np.arange(first, min(first + ROWS, len(table))))
            starts = self.clock.correct(part.start + self.base) - zero
            yield [self._slice(part, row, int(starts[row]), places) for row in range(len(part))]

    def _slice(self, part: Events, row: int, start: int, places: list[tuple[int, int]]) -> dict[str, Any]:
        trace = self.trace
        pid, tid = places[part.lane[row]]
        arguments: dict[str, Any] = {}
        if part.correlation[row] >= 0:
            arguments["correlation"] = self._id(int(part.correlation[row]))
        if part.shape[row] >= 0:
            arguments["Input Dims"] = trace.shapes[part.shape[row]]
        if trace.lanes[part.lane[row]].on_device:
            arguments["device"] = trace.lanes[part.lane[row]].device
        return {
            "ph": "X",
            "cat": category_of(Kind(part.kind[row]), trace.lanes[part.lane[row]].on_device),
            "name": trace.names[part.name[row]],
            "pid": pid,
            "tid": tid,
            "ts": Decimal(start) / 1000,
            "dur": Decimal(int(part.duration[row])) / 1000,
            "args": arguments,
        }


def _nanoseconds(microseconds: Any) -> int | None:
    """Exact, also of a decimal; None where there is no time."""
    if isinstance(microseconds, int):
        return microseconds * 1000
    if isinstance(microseconds, float):
        if not math.isfinite(microseconds):
            return None
        whole = math.floor(microseconds)
        return whole * 1000 + round((microseconds - whole) * 1000)
    try:
        return int((Decimal(microseconds) * 1000).to_integral_value())
    except (ArithmeticError, ValueError, TypeError):
        return None
