"""Chrome traces as columns: what PyTorch, JAX, viztracer, py-spy and all others that write them share."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np

from bench.traces.classify import DEVICE_CATEGORIES, HOST_CATEGORIES
from bench.traces.events import Events, Kind, Lane, Memory, distinct
from bench.traces.flops import OPERATORS
from bench.traces.readers.chrome_event import NO_JSON, Arguments, Event
from bench.traces.readers.columns import (
    LONGEST_NS,
    Codes,
    Columns,
    integers,
    nanoseconds,
    number,
    used_codes,
)
from bench.traces.readers.labels import Labels
from bench.traces.readers.messages import message_bytes

# What the format has besides slices ("X", or "B" and "E") and labels ("M").
_OTHER_PHASES = {
    **dict.fromkeys("stf", "flow arrows"),
    **dict.fromkeys("iIRn", "instants"),
    **dict.fromkeys("C", "counter samples"),
    **dict.fromkeys("beSTFp", "asynchronous slices"),
    **dict.fromkeys("NOD", "object snapshots"),
    **dict.fromkeys("P", "stack samples"),
    "": "events without a phase",
}
_NO_ARGUMENTS = Arguments()
_COLLECTIVE = re.compile(r"nccl(:|\w*Kernel)|gloo:")
FLOATS = {
    "float": "float32",
    "double": "float64",
    "c10::BFloat16": "bfloat16",
    "c10::Half": "float16",
}
"""As torch writes them, and their names."""
_CUDA = 1  # "Device Type" of a sample of memory: c10::DeviceType


class ChromeColumns:
    """Takes events list by list (``add``), in order of the file; then ``finish`` and ``memory``."""

    def __init__(self, path: str) -> None:
        self.columns = Columns(path)
        self.labels = Labels()
        self._dropped = self.columns.dropped
        self._lanes = Codes()
        self._devices: dict[int, int] = {}  # of a lane, by its slices
        self._host_lanes: set[int] = set()
        self._detailed: list[bool] = []  # of a name
        self._begun: dict[tuple[Any, Any], list[Event]] = {}
        self._memory: list[tuple[Any, float, float, int]] = []
        self.product_ns: Counter[str] = Counter()

    def add(self, events: list[Event]) -> None:
        slices = [event for event in events if event.ph == "X"]
        if len(slices) != len(events):
            slices += self._other([event for event in events if event.ph != "X"])
        if slices:
            self._add_slices(slices)

    def _add_slices(self, slices: list[Event]) -> None:
        count = len(slices)
        names, lanes, categories = self.columns.names, self._lanes, self.columns.categories
        arguments = [event.args or _NO_ARGUMENTS for event in slices]
        start, known_start = nanoseconds([event.ts for event in slices])
        duration, known_duration = nanoseconds([event.dur for event in slices])
        part = {
            "start": start,
            "duration": duration,
            "name": np.fromiter([names[event.name] for event in slices], np.int32, count),
            "category": np.fromiter([categories[event.cat or ""] for event in slices], np.int32, count),
            "lane": np.fromiter(
                map(lanes.__getitem__, map(attrgetter("pid", "tid"), slices)), np.int32, count
            ),
            "correlation": integers([a.correlation for a in arguments]),
            "shape": self._shape_codes(arguments),
            "bytes": np.full(count, -1, np.int64),
        }
        self._add_products(part, arguments)
        self._find_devices(part, slices, arguments)
        self._add_details(part, slices)
        good = known_start & known_duration & (duration >= 0) & (duration < LONGEST_NS)
        if not good.all():
            self._dropped["slices without a valid start"] += int((~known_start).sum())
            self._dropped["slices without a valid duration"] += int((known_start & ~known_duration).sum())
            negative = known_start & known_duration & (duration < 0)
            self._dropped["slices of negative duration"] += int(negative.sum())
            endless = known_start & known_duration & (duration >= LONGEST_NS)
            self._dropped["slices longer than 104 days"] += int(endless.sum())
            part = {name: values[good] for name, values in part.items()}
        self.columns.add(**part)

    def _shape_codes(self, arguments: list[Arguments]) -> np.ndarray:
        shapes = self.columns.shapes
        codes = [-1 if a.input_dims is NO_JSON else shapes[bytes(a.input_dims)] for a in arguments]
        return np.array(codes, np.int32)

    def _add_products(self, part: dict[str, np.ndarray], arguments: list[Arguments]) -> None:
        """Products of matrices by the type of what they multiply: the columns have no types."""
        codes = [self.columns.names[name] for name in OPERATORS if name in self.columns.names]
        for row in np.flatnonzero(np.isin(part["name"], codes)).tolist():
            types = bytes(arguments[row].input_type).decode("utf-8", "replace")
            found = [word for word in re.findall(r'"([^"]*)"', types) if word in FLOATS]
            self.product_ns[FLOATS[found[0]] if found else ""] += max(int(part["duration"][row]), 0)

    def _find_devices(
        self, part: dict[str, np.ndarray], slices: list[Event], arguments: list[Arguments]
    ) -> None:
        """Lanes on which something is that only a device has are streams of one, whatever they are called;
        and only such slices have bytes."""
        categories = [str(category).lower() for category in self.columns.categories]
        of_host = np.array([category in HOST_CATEGORIES for category in categories], bool)
        self._host_lanes.update(distinct(part["lane"][of_host[part["category"]]]).tolist())
        of_device = np.array([category in DEVICE_CATEGORIES for category in categories], bool)
        rows = np.flatnonzero(of_device[part["category"]])
        part["bytes"][rows] = integers([arguments[row].bytes for row in rows.tolist()])
        lanes, first = np.unique(part["lane"][rows], return_index=True)
        for lane, row in zip(lanes.tolist(), rows[first].tolist(), strict=True):
            if lane not in self._devices:
                event = slices[row]
                told = event.args.device if event.args is not None else None
                found = number(event.pid if told is None else told)
                self._devices[lane] = int(found) if 0 <= found < 1 << 20 else 0

    def _add_details(self, part: dict[str, np.ndarray], slices: list[Event]) -> None:
        """What collectives, known by their names, and slices without a category (JAX's) carry besides."""
        groups, categories = self.columns.groups, self.columns.categories
        for name in list(self.columns.names)[len(self._detailed) :]:
            self._detailed.append(_COLLECTIVE.match(name) is not None)
        wanted = np.array(self._detailed)[part["name"]] | (part["category"] == categories.get("", -1))
        part["group"] = np.full(len(slices), -1, np.int32)
        for row in np.flatnonzero(wanted).tolist():
            details = slices[row].args
            if details is None:
                continue
            if details.collective is not None or slices[row].name.startswith(("gloo:", "nccl:")):
                part["bytes"][row] = message_bytes(details)
                if details.group is not None:
                    size = number(details.group_size)
                    key = (details.group, details.group_description or "", int(size) if size > 0 else 0)
                    part["group"][row] = groups[key]
            elif details.step_num is not None:
                part["category"][row] = categories["step_num"]
            elif details.hlo_op is not None:
                part["category"][row] = categories["hlo_op"]

    def _other(self, events: list[Event]) -> list[Event]:
        """Counts what is no slice, keeps labels and samples of memory; slices that end here."""
        ended = []
        phases = Counter(map(attrgetter("ph"), events))
        for phase, count in phases.items():
            if phase not in ("M", "B", "E"):
                self._dropped[_OTHER_PHASES.get(phase, "events of an unknown phase")] += count
        for event in [event for event in events if event.ph in "iMBE"]:
            if event.ph == "i" and event.name == "[memory]" and event.args is not None:
                self._sample(event, event.args)
            elif event.ph == "M" and event.args is not None:
                text = event.args.labels if event.name == "process_labels" else event.args.name
                self.labels.add(event.name, event.pid, event.tid, text or "")
            elif event.ph == "B":
                self._begun.setdefault((event.pid, event.tid), []).append(event)
            elif event.ph == "E":
                begun = self._begun.get((event.pid, event.tid))
                if begun:
                    ended.append(_complete(begun.pop(), event))
                else:
                    self._dropped["ends of slices that have no beginning"] += 1
        return ended

    def _sample(self, event: Event, details: Arguments) -> None:
        device = number(details.device_id) if number(details.device_type) >= _CUDA else -1
        device = int(device) if 0 <= device < 1 << 20 else -1
        self._memory.append((event.ts, number(details.allocated), number(details.allocation), device))
        self._dropped["instants"] -= 1

    def finish(
        self, recognise: Callable[[str, str], Kind], left_out: Sequence[str] = ()
    ) -> tuple[Events, list[Lane], int]:
        """The events, their lanes, and the nanosecond of their origin (see ``Columns.finish``)."""
        begun = sum(len(events) for events in self._begun.values())
        if begun:
            self._dropped["slices without an end"] += begun
        known = Codes()  # a number and the same number in a string are one thread
        codes = np.array([known[str(p), str(t)] for p, t in self._lanes], np.int32)
        devices = {int(codes[code]): -1 for code in self._host_lanes}
        devices |= {int(codes[code]): device for code, device in self._devices.items()}
        lanes = [self.labels.lane(p, t, devices.get(code)) for (p, t), code in known.items()]
        events, origin = self.columns.finish(recognise, codes, left_out)
        events.lane, used = used_codes(events.lane, len(lanes))
        return events, [lane for lane, kept in zip(lanes, used, strict=True) if kept], origin

    def memory(self, origin: int) -> Memory:
        """Samples in order of time. Old ones only say what was allocated or freed: then the bytes are counted
        from the first sample on."""
        time, valid = nanoseconds([sample[0] for sample in self._memory])
        total = np.array([sample[1] for sample in self._memory])
        change = np.array([sample[2] for sample in self._memory])
        device = np.array([sample[3] for sample in self._memory], np.int32)
        order = np.flatnonzero(valid)
        order = order[np.argsort(time[order], kind="stable")]
        time, total, change, device = time[order] - origin, total[order], change[order], device[order]
        for number_ in distinct(device):
            rows = np.flatnonzero(device == number_)
            if not np.isfinite(total[rows]).any():
                total[rows] = np.cumsum(np.nan_to_num(change[rows], posinf=0, neginf=0))
        good = np.abs(total) < 1 << 62
        return Memory(time[good], total[good].astype(np.int64), device[good])


def _complete(begin: Event, end: Event) -> Event:
    begin.ph, begin.dur = "X", number(end.ts) - number(begin.ts)
    begin.args = begin.args or end.args
    return begin
