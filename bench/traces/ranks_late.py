"""In what a late rank was late: the operations on which it spent more than the others did there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.traces.breakdown import WAITS
from bench.traces.classify import is_communication_call
from bench.traces.collectives import Matched
from bench.traces.events import Kind, Trace, distinct
from bench.traces.intervals import Intervals, covered, subtract, union
from bench.traces.ranks_rounds import Rounds
from bench.traces.tree import parents, self_time

TOLERANCE = 0.1
"""A rank that costs the job up to 10 % is not called late: equal work on equal cores differs that much."""
NOTHING = ""
"""The name of the time in which no operation was recorded (Python, a sleep, a data loader, the system)."""
_KEPT = 5


@dataclass(frozen=True)
class Excess:
    """An operation by name ("" for time in which nothing was recorded) and where it ran ("host", "device").

    nanoseconds: its self time on the late rank less the median of the others', a round (or a call).
    ratio: over the others' median; None where they spent none on it.
    after: the operation just before, where nothing was recorded.
    """

    name: str
    place: str
    nanoseconds: int
    ratio: float | None
    after: str = ""


@dataclass(frozen=True)
class Spent:
    """The slices of a trace that can make a rank late: neither communication nor waiting.

    Columns of equal length: name, an index into ``names`` (a name and where it runs); start, end and own time
    in int64 nanoseconds.
    """

    names: list[tuple[str, str]]
    name: np.ndarray
    start: np.ndarray
    own: np.ndarray
    end: np.ndarray

    @classmethod
    def of(cls, trace: Trace) -> Spent:
        events = trace.events
        calls = np.array([_communicates(name) for name in trace.names], bool)
        spends = ~np.isin(events.kind, (*WAITS, Kind.COMMUNICATION, Kind.STEP, Kind.UNCLASSIFIED))
        rows = np.flatnonzero(spends & ~calls[events.name] if len(calls) else spends)
        device = trace.on_device()[rows]
        # A range that a user named, as copied onto a device's lane, spends nothing there itself.
        rows, device = (each[~(device & (events.kind[rows] == Kind.ANNOTATION))] for each in (rows, device))
        own = self_time(events, parents(events))[rows]
        names = [(name, place) for place in ("host", "device") for name in trace.names]
        code = events.name[rows] + len(trace.names) * device
        return cls(names, code, events.start[rows], own, events.end[rows])


def _communicates(name: str) -> bool:
    return is_communication_call(name) or name.startswith(("nccl:", "rccl:"))


def _names(spent: Sequence[Spent]) -> tuple[list[tuple[str, str]], list[np.ndarray]]:
    """One table of names for all ranks, and each rank's codes into it."""
    table: dict[tuple[str, str], int] = {}
    codes = []
    for one in spent:
        used = distinct(one.name)
        into = np.zeros(len(one.names), np.int64)
        for code in used.tolist():
            into[code] = table.setdefault(one.names[code], len(table))
        codes.append(into[one.name])
    return list(table), codes


class OwnTimes:
    """What each of some ranks (columns) spent in every round, by operation: made once, for all of them are
    held against the others.

    elsewhere: when each rank was in collectives; what neither that nor a slice covers was not recorded.
    """

    def __init__(
        self, spent: Sequence[Spent], rounds: Rounds, elsewhere: Sequence[Intervals], columns: Sequence[int]
    ) -> None:
        self._spent, self._rounds, self._columns = spent, rounds, list(columns)
        self._table, codes = _names(spent)
        self._gaps = {one: _unrecorded(spent[one], elsewhere[one], rounds, one) for one in columns}
        sums = []
        for one in columns:
            by_name = _by_round(spent[one], codes[one], len(self._table), rounds, one)
            gaps = covered(self._gaps[one], rounds.start[one], rounds.end[one])
            sums.append(np.column_stack((by_name, gaps)))
        self._sums = np.stack(sums)
        self._ordered = np.sort(self._sums, axis=0)

    def excess(self, late: int) -> list[Excess]:
        """Where the rank in column ``late`` spends more than the median of the others: medians of the
        rounds."""
        mine = self._sums[self._columns.index(late)]
        usual = median_without(self._ordered, mine)
        middle = np.median(mine - usual, axis=0)
        rounds, gaps = self._rounds, self._gaps[late]
        gap_after = _before_the_gap(self._spent[late], gaps, rounds, late) if middle[-1] > 0 else ""
        return _most(self._table, middle, np.median(usual, axis=0), gap_after)


def median_without(ordered: np.ndarray, one: np.ndarray) -> np.ndarray:
    """The median along the first axis, in which values are in order, of all values but ``one`` of them."""
    rest = len(ordered) - 1
    # Without it, what stands behind it moves up by one place.
    low, high = (
        np.where(ordered[place] < one, ordered[place], ordered[place + 1])
        for place in ((rest - 1) // 2, rest // 2)
    )
    return (low + high) / 2


def _by_round(one: Spent, code: np.ndarray, names: int, rounds: Rounds, column: int) -> np.ndarray:
    """float64 (rounds, names): self time by operation."""
    start, end = rounds.start[column], rounds.end[column]
    place = np.searchsorted(start, one.start, "right") - 1
    inside = (place >= 0) & (one.start < end[np.maximum(place, 0)])
    flat = place[inside] * names + code[inside]
    sums = np.bincount(flat, one.own[inside].astype(np.float64), len(start) * names)
    return sums.reshape(len(start), names)


def _unrecorded(one: Spent, elsewhere: Intervals, rounds: Rounds, column: int) -> Intervals:
    """When, in the rounds, no operation was recorded and no collective was under way."""
    whole = union(rounds.start[column], rounds.end[column])
    return subtract(subtract(whole, union(one.start, one.end)), elsewhere)


def _before_the_gap(one: Spent, gaps: Intervals, rounds: Rounds, column: int) -> str:
    """The operation after which, most often, the longest stretch of a round begins in which nothing ran."""
    order = np.argsort(one.start, kind="stable")
    start, ended, name = one.start[order], one.end[order], one.name[order]
    # Who ends last is the outermost: a call that others were made in.
    later = ended > np.append(-1, np.maximum.accumulate(ended)[:-1])
    holds = np.maximum.accumulate(np.where(later, np.arange(len(ended)), 0))
    found: Counter[str] = Counter()
    for first, last in zip(rounds.start[column].tolist(), rounds.end[column].tolist(), strict=True):
        low, high = np.searchsorted(gaps.start, (first, last))
        if low < high:
            begins = gaps.start[low + int((gaps.end - gaps.start)[low:high].argmax())]
            before = int(np.searchsorted(start, begins, "left")) - 1
            found[one.names[name[holds[before]]][0] if before >= 0 else ""] += 1
    return found.most_common(1)[0][0] if found else ""


def excess_by_collective(
    spent: Sequence[Spent], traces: Sequence[Trace], matched: Matched, key: int, late: int
) -> Excess | None:
    """The operation between the previous collective and this one on which the late rank spends most above the
    median of the others, a call; None where there is none."""
    table, codes = _names(spent)
    others = [column for column in range(len(spent)) if column != late]
    means = {}
    for column in (late, *others):
        here = matched.row[:, column] >= 0
        arrivals = traces[column].events.start[matched.row[here, column]]
        order = np.argsort(arrivals, kind="stable")
        which = matched.key[here][order]
        if not (which == key).any():
            continue
        place = np.searchsorted(arrivals[order], spent[column].start, "left")
        before = place < len(which)
        mine = before & (which[np.minimum(place, len(which) - 1)] == key)
        sums = np.bincount(codes[column][mine], spent[column].own[mine].astype(np.float64), len(table))
        means[column] = sums / int((which == key).sum())
    theirs = [means[column] for column in others if column in means]
    if late not in means or not theirs:
        return None
    usual = np.median(theirs, axis=0)
    found = _most(table, np.append(means[late] - usual, 0), np.append(usual, 0), "")
    return found[0] if found else None


def _most(table: list[tuple[str, str]], excess: np.ndarray, theirs: np.ndarray, after: str) -> list[Excess]:
    result = []
    for code in np.argsort(-excess, kind="stable")[:_KEPT].tolist():
        if excess[code] <= 0:
            break
        name, place = table[code] if code < len(table) else (NOTHING, "host")
        usual = float(theirs[code])
        ratio = (usual + float(excess[code])) / usual if usual > 0 else None
        result.append(Excess(name, place, round(float(excess[code])), ratio, "" if name else after))
    return result
