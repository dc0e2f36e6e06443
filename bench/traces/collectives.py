"""Collectives and messages of every rank, matched: which call here is which call there.

A profiler says nothing that is equal on all ranks of one call, so calls are counted: the k-th call of an
operation, on a group, with a message of so many bytes, is the same call on every rank. Ranks that began to
record later, or died, have fewer calls; theirs are shifted to where the times fit best, and what is left over
is counted.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.traces.events import Kind, Trace
from bench.traces.tree import launched_by, parents

OPERATIONS = (  # in this order: "all_reduce" holds "reduce"
    ("reduce_scatter", "reducescatter"),
    ("all_reduce", "allreduce|crossdevicereduce|oneshot|twoshot|multimem"),
    ("all_gather", "allgather"),
    ("all_to_all", "alltoall|a2a"),
    ("broadcast", "broadcast"),
    ("barrier", "barrier"),
    ("send_recv", "sendrecv"),
    ("send", "send"),
    ("recv", "recv"),
    ("dispatch", "dispatch"),
    ("combine", "combine"),
    ("reduce", "reduce"),
    ("gather", "gather"),
    ("scatter", "scatter"),
)
SYNCHRONIZING = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "barrier")
"""No rank leaves one of these before the last has arrived."""
MESSAGES = ("send", "recv", "send_recv")
_SHARES = ("all_gather", "gather")  # an annotation has a rank's share; a kernel's bytes are of the whole
_ONLY_CALLED = re.compile(r"c10d::(?!.*wait)")
_LOOKED_AT = 256  # calls of a rank that has fewer, evenly spread, by which a shift of theirs is judged
_AT_ONCE = 4096  # shifts
_AROUND = 3  # shifts to either side of the one that the times say


def operation(name: str) -> str:
    """all_reduce of ``ncclDevKernel_AllReduce_Sum_f32_RING_LL``, of ``gloo:all_reduce`` and of
    ``c10d::allreduce_``; the name itself where it is none of ``OPERATIONS``."""
    plain = name.lower().replace("_", "").partition("(")[0]
    return next((known for known, pattern in OPERATIONS if re.search(pattern, plain)), name)


@dataclass(frozen=True)
class Calls:
    """Collectives and messages of one rank, in order of their start.

    row: (calls,) rows of the trace's events. operation, group: text; bytes: int64, -1 where unknown.
    whole: False where only the call was recorded (``c10d::``): its end is not the collective's.
    """

    row: np.ndarray
    operation: list[str]
    group: list[str]
    bytes: np.ndarray
    whole: bool = True


def calls(trace: Trace) -> Calls:
    """On a device where the trace has one; else the backend's intervals (gloo); else the calls of c10d."""
    events = trace.events
    rows = np.flatnonzero(events.kind == Kind.COMMUNICATION)
    device = trace.on_device()[rows]
    whole = True
    if device.any():
        rows = rows[device]
    elif not len(rows):
        called = np.array([bool(_ONLY_CALLED.match(name)) for name in trace.names], bool)
        rows = np.flatnonzero(called[events.name]) if len(called) else rows
        whole = False
    rows = rows[np.argsort(events.start[rows], kind="stable")]
    words = [operation(name) for name in trace.names]
    found = [words[code] for code in events.name[rows]]
    group = [trace.groups[code] if code >= 0 else "" for code in events.group[rows]]
    size = events.bytes[rows].copy()
    if device.any() and len(rows):
        _from_the_host(trace, rows, found, group, size)
    return Calls(rows, found, group, size, whole)


def _from_the_host(
    trace: Trace, rows: np.ndarray, found: list[str], group: list[str], size: np.ndarray
) -> None:
    """What a kernel does not say, the host's slices around its launch do: NCCL runs an all_to_all as
    SendRecv, and older traces have no bytes and no group on kernels."""
    events = trace.events
    above, launch = parents(events), launched_by(events)[rows]
    known = dict(OPERATIONS)
    vague = {"send_recv"} | (set(found) - set(known))
    for index, row in enumerate(launch):
        while row >= 0:
            name = trace.names[events.name[row]]
            if name.startswith(("nccl:", "rccl:", "c10d::", "record_param_comms")):
                word = operation(name)
                if found[index] in vague and word in known:
                    found[index] = word
                if size[index] < 0 and found[index] not in _SHARES:
                    size[index] = events.bytes[row]
                if not group[index] and events.group[row] >= 0:
                    group[index] = trace.groups[events.group[row]]
            row = above[row]


@dataclass
class Matched:
    """Calls that belong together: a row a collective in order of time, a column a rank (``ranks``).

    start, end: int64 (collectives, ranks) nanoseconds from ``origin_ns``, each rank by its own clock.
    row: int64 (collectives, ranks), the row of that rank's events; -1 where the rank takes no part.
    key: int64 (collectives,), index into ``keys``: (operation, group, bytes, or -1 where ranks differ).
    bytes: int64 (collectives,), the largest message of a rank, -1 where unknown.
    whole: bool (ranks,), as of ``Calls``. unmatched: what has no partner, counted, by rank.
    """

    ranks: list[int]
    start: np.ndarray
    end: np.ndarray
    row: np.ndarray
    key: np.ndarray
    bytes: np.ndarray
    keys: list[tuple[str, str, int]]
    whole: np.ndarray
    origin_ns: int = 0
    unmatched: list[Counter[str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.key)

    @property
    def present(self) -> np.ndarray:
        """bool (collectives, ranks)"""
        return self.row >= 0

    @property
    def synchronizing(self) -> np.ndarray:
        """bool (collectives,)"""
        able = np.array([key[0] in SYNCHRONIZING for key in self.keys], bool)
        return able[self.key] if len(self.keys) else np.zeros(0, bool)

    def select(self, wanted: np.ndarray) -> None:
        """Keep these collectives (a mask or indices) only."""
        self.start, self.end, self.row = self.start[wanted], self.end[wanted], self.row[wanted]
        self.key, self.bytes = self.key[wanted], self.bytes[wanted]


def match(traces: Sequence[Trace], ranks: Sequence[int]) -> Matched:
    """The calls of all traces, matched. Times of traces that know their origin are counted from the earliest
    origin; those of others from their own."""
    known = [trace.origin_ns for trace in traces if trace.origin_ns]
    origin = min(known) if len(known) == len(traces) else 0
    every = [calls(trace) for trace in traces]
    shared = _keys(every)
    places: list[_Places] = []
    for one in every:
        by_key: _Places = defaultdict(list)
        for index, key in enumerate(_keys_of(one, shared)):
            by_key[key].append(index)
        places.append(by_key)
    unmatched: list[Counter[str]] = [Counter() for _ in traces]
    world = max((trace.world_size for trace in traces), default=-1)
    _pair_messages(places, ranks, world == len(traces), unmatched)
    starts, ends = [], []
    for trace, one in zip(traces, every, strict=True):
        base = trace.origin_ns - origin if origin else 0
        starts.append(trace.events.start[one.row] + base)
        ends.append(trace.events.end[one.row] + base)
    keys: list[tuple[str, str, int]] = []
    blocks: list[np.ndarray] = []  # (calls, ranks) indices into each rank's calls, -1 where it has none
    codes: list[np.ndarray] = []
    for key in dict.fromkeys(key for by_key in places for key in by_key):
        mine = [np.array(by_key.get(key, []), np.int64) for by_key in places]
        block = _aligned(mine, ends, origin > 0)
        together = (block >= 0).sum(axis=1) > 1
        for column in range(len(traces)):
            alone = len(mine[column]) - int((block[together, column] >= 0).sum())
            if alone:
                unmatched[column][key[0]] += alone
        if together.any():
            blocks.append(block[together])
            codes.append(np.full(int(together.sum()), len(keys)))
            keys.append(key)
    found = np.concatenate(blocks) if blocks else np.empty((0, len(traces)), np.int64)
    return _table(list(ranks), found, codes, keys, every, starts, ends, origin, unmatched)


def _table(
    ranks: list[int],
    index: np.ndarray,
    codes: list[np.ndarray],
    keys: list[tuple[str, str, int]],
    every: list[Calls],
    starts: list[np.ndarray],
    ends: list[np.ndarray],
    origin: int,
    unmatched: list[Counter[str]],
) -> Matched:
    start, end, row, size = (np.full(index.shape, -1, np.int64) for _ in range(4))
    for column, one in enumerate(every):
        here = index[:, column] >= 0
        chosen = index[here, column]
        start[here, column], end[here, column] = starts[column][chosen], ends[column][chosen]
        row[here, column], size[here, column] = one.row[chosen], one.bytes[chosen]
    whole = np.array([one.whole for one in every], bool)
    key = np.concatenate(codes) if codes else np.empty(0, np.int64)
    largest = size.max(axis=1, initial=-1)
    matched = Matched(ranks, start, end, row, key.astype(np.int64), largest, keys, whole, origin, unmatched)
    first = np.where(matched.present, start, np.iinfo(np.int64).max)
    matched.select(np.argsort(first.min(axis=1), kind="stable") if len(key) else np.empty(0, np.int64))
    return matched


_Places = dict[tuple[str, str, int], list[int]]  # key -> indices of one rank's calls


def _keys(every: Sequence[Calls]) -> dict[tuple[str, str], bool]:
    """(operation, group) -> the message belongs to the key: all ranks have messages of the same sizes.

    It then tells calls apart that threads of a backend may start in another order on another rank. Sizes of
    an all_to_all or a gather may differ from rank to rank.
    """
    sizes: dict[tuple[str, str], list[set[int]]] = defaultdict(list)
    for one in every:
        mine: dict[tuple[str, str], set[int]] = defaultdict(set)
        for word, group, size in zip(one.operation, one.group, one.bytes.tolist(), strict=True):
            mine[word, group].add(size)
        for key, values in mine.items():
            sizes[key].append(values)
    return {key: all(values == found[0] for values in found) for key, found in sizes.items()}


def _keys_of(one: Calls, shared: dict[tuple[str, str], bool]) -> list[tuple[str, str, int]]:
    return [
        (word, group, size if shared[word, group] else -1)
        for word, group, size in zip(one.operation, one.group, one.bytes.tolist(), strict=True)
    ]


def _pair_messages(
    places: list[_Places], ranks: Sequence[int], everyone: bool, unmatched: list[Counter[str]]
) -> None:
    """Messages between exactly two ranks: a send here is a recv there. With more ranks nobody can say whose
    message it is (profilers do not name the peer), and they stay unmatched; so do those of two ranks of a
    larger group, where a rank that is not here may be the peer. everyone: all ranks of the job are here."""
    holders = [column for column, by_key in enumerate(places) if any(key[0] in MESSAGES for key in by_key)]
    for column in holders:
        by_key = places[column]
        for key in [key for key in by_key if key[0] in MESSAGES]:
            if len(holders) != 2 or not (everyone or key[1].endswith(" of 2")):
                unmatched[column][f"{key[0]} (its peer is not recorded)"] += len(by_key.pop(key))
            elif key[0] != "send_recv":
                one, other = ranks[column], ranks[holders[column == holders[0]]]
                way = (one, other) if key[0] == "send" else (other, one)
                by_key[f"message {way[0]} to {way[1]}", key[1], key[2]] = by_key.pop(key)


def _aligned(mine: list[np.ndarray], ends: list[np.ndarray], one_time: bool) -> np.ndarray:
    """(calls, ranks) indices of each rank's calls, -1 where it has none, from the rank with the most on.

    A rank with fewer is shifted to where its ends fit best: nearest to the others' where times can be
    compared, else at the most constant distance.
    """
    most = max(range(len(mine)), key=lambda column: len(mine[column]))
    rows = len(mine[most])
    block = np.full((rows, len(mine)), -1, np.int64)
    reference = ends[most][mine[most]]
    for column, indices in enumerate(mine):
        count = len(indices)
        if count:
            shift = _shift(ends[column][indices], reference, one_time) if count < rows else 0
            block[shift : shift + count, column] = indices
    return block


def _shift(ends: np.ndarray, reference: np.ndarray, one_time: bool) -> int:
    """How many calls of the reference came before the first of these, of which there are fewer."""
    largest = len(reference) - len(ends)
    looked_at = np.arange(0, len(ends), -(-len(ends) // _LOOKED_AT))
    first, last = 0, largest
    if one_time:
        begun = np.searchsorted(np.maximum.accumulate(reference), ends[looked_at], "left") - looked_at
        middle = int(np.clip(np.median(begun), 0, largest))
        first, last = max(0, middle - _AROUND), min(largest, middle + _AROUND)
    best, found = np.inf, first
    for begin in range(first, last + 1, _AT_ONCE):
        candidates = np.arange(begin, min(begin + _AT_ONCE, last + 1))
        distance = ends[looked_at] - reference[candidates[:, None] + looked_at]
        if not one_time:
            distance = distance - np.median(distance, axis=1, keepdims=True)
        misfit = np.median(np.abs(distance), axis=1)
        if misfit.min() < best:
            best, found = float(misfit.min()), int(candidates[misfit.argmin()])
    return found
