"""The ranks of one job beside each other: who waits, for whom, what for, and how fast bytes move.

In a collective the time of a rank has two parts: *skew*, from its arrival until the last rank has arrived,
and *transfer*, from then to the end. Only the second is the network's; the first is some rank's lateness.

A rank's *own time* in a round (a step, or from one call of a collective to the next) is the round less what
it spent in collectives while it computed nothing. A late rank has more own time than the others have in the
same rounds. It is named only if this costs the job more than ``TOLERANCE`` with 95 % certainty: the round is
compared, paired, with what it would take if the rank were as quick as the median of the others (the "what-if"
slowdown of Lin et al., 2025, "Understanding Stragglers in Large Model Training Using What-if Analysis").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from bench import stats
from bench.traces.clocks import RankClock, align
from bench.traces.collectives import Matched, match
from bench.traces.collectives_cost import Collective, costs
from bench.traces.events import Job, Trace
from bench.traces.ranks_late import TOLERANCE, Excess, OwnTimes, Spent
from bench.traces.ranks_own import own_time
from bench.traces.ranks_rounds import Rounds, rounds_of

SINGLE = 0.25
"""One operation is named where it makes up a quarter or more of the rank's lateness."""


@dataclass(frozen=True)
class Lateness:
    """One rank against the others. cost: the round over the round without its lateness, with the interval;
    None where too few rounds are there. excess_ns: own time above the median of the others', median of the
    rounds. waited_ns: what it waited for others, handed_ns: what its threads waited for one another or for a
    core around a collective, medians of the rounds. last: in how many collectives it was the last to arrive.
    operations: in what it spent more than the others, the most first.
    """

    rank: int
    cost: stats.Comparison | None
    excess_ns: int
    waited_ns: int
    handed_ns: int
    last: int
    operations: list[Excess]

    @property
    def late(self) -> bool:
        return self.cost is not None and self.cost.verdict == "slower"

    @property
    def operation(self) -> Excess | None:
        """The one in which the rank was late; None where no single one stands out."""
        first = self.operations[0] if self.operations else None
        return first if first is not None and first.nanoseconds >= SINGLE * self.excess_ns > 0 else None


@dataclass
class Ranks:
    """What the ranks of a job say together. ranks, clocks and lateness are of one length."""

    ranks: list[int]
    world_size: int
    missing: list[int]
    clocks: list[RankClock] = field(default_factory=list)
    rounds: Rounds | None = None
    lateness: list[Lateness] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    matched: Matched | None = None

    @property
    def late(self) -> list[Lateness]:
        """The ranks that are late for certain, the costliest first."""
        found = [one for one in self.lateness if one.late]
        return sorted(found, key=lambda one: -one.excess_ns)


def compare_ranks(job: Job) -> Ranks:
    """The ranks of a job beside each other. Never raises for what is in the traces: what cannot be compared,
    and why, stands in ``notes``."""
    traces, ranks, notes = _ranked(job)
    world = max((trace.world_size for trace in traces), default=-1)
    missing = sorted(set(range(world)) - set(ranks)) if world > 0 else []
    found = Ranks(ranks, world, missing, notes=notes)
    if len(traces) < 2:
        notes.append("one rank only: there is nothing to compare it with")
        return found
    matched = found.matched = match(traces, ranks)
    found.clocks = align(matched, traces)
    _drop_impossible(matched, found.clocks, notes)
    for rank, left in zip(ranks, matched.unmatched, strict=True):
        if left:
            words = ", ".join(f"{count} {word}" for word, count in left.items())
            notes.append(f"rank {rank}: without a partner on another rank: {words}")
    strange = [rank for rank, clock in zip(ranks, found.clocks, strict=True) if clock.how == "unknown"]
    if strange:
        notes.append(f"nothing relates the clocks of ranks {strange} to the others': they are in no skew")
    if not len(matched):
        notes.append("no collective is on two ranks: who waits for whom cannot be seen")
        return found
    arrival, end = _on_one_clock(matched, found.clocks)
    usable = np.array([clock.how != "unknown" for clock in found.clocks])
    spent = [Spent.of(trace) for trace in traces]
    found.rounds = rounds_of(matched, traces)
    found.lateness = _lateness(found, traces, spent, arrival, usable)
    found.collectives = costs(matched, traces, spent, found.clocks, world, arrival, end)
    return found


def _ranked(job: Job) -> tuple[list[Trace], list[int], list[str]]:
    """Traces that can be compared and their ranks, each rank once; what was left out is said."""
    notes = [f"{path} could not be read" for path, _ in job.failures]
    timed = [trace for trace in job.traces if trace.timed and len(trace.events)]
    if len(timed) < len(job.traces):
        notes.append(f"{len(job.traces) - len(timed)} reports have no places in time and are not compared")
    if len(timed) > 1 and all(trace.rank < 0 for trace in timed):
        notes.append("the reports do not say their ranks: they are numbered in the order of their names")
        return timed, list(range(len(timed))), notes
    kept: dict[int, Trace] = {}
    for trace in timed:
        if trace.rank in kept or (trace.rank < 0 and len(timed) > 1):
            notes.append(f"{trace.source}: left out, " + _why_left_out(trace, kept))
        else:
            kept[trace.rank] = trace
    return list(kept.values()), list(kept), notes


def _why_left_out(trace: Trace, kept: dict[int, Trace]) -> str:
    if trace.rank < 0:
        return "it does not say its rank, and the others do"
    return f"rank {trace.rank} is also in {kept[trace.rank].source}"


def _on_one_clock(matched: Matched, clocks: Sequence[RankClock]) -> tuple[np.ndarray, np.ndarray]:
    """(arrival, end), int64 (collectives, ranks) nanoseconds in the first rank's time."""
    pairs = [
        (clock.correct(matched.start[:, column]), clock.correct(matched.end[:, column]))
        for column, clock in enumerate(clocks)
    ]
    return np.stack([pair[0] for pair in pairs], 1), np.stack([pair[1] for pair in pairs], 1)


def _drop_impossible(matched: Matched, clocks: Sequence[RankClock], notes: list[str]) -> None:
    """What ended on one rank before it began on another was not one collective: the ranks are of different
    groups that the report does not tell apart."""
    arrival, end = _on_one_clock(matched, clocks)
    present = matched.present & matched.whole
    last = np.where(present, arrival, np.iinfo(np.int64).min).max(axis=1)
    first_end = np.where(present, end, np.iinfo(np.int64).max).min(axis=1)
    slack = 2 * max(clock.exact for clock in clocks) + 1_000
    impossible = matched.synchronizing & (first_end + slack < last)
    if impossible.any():
        notes.append(
            f"{int(impossible.sum())} of {len(matched)} matched collectives ended on one rank before they "
            "began on another: not the same call (groups that the report does not name?); they are left out"
        )
        matched.select(~impossible)


def _lateness(
    found: Ranks, traces: Sequence[Trace], spent: Sequence[Spent], arrival: np.ndarray, usable: np.ndarray
) -> list[Lateness]:
    matched, rounds = found.matched, found.rounds
    assert matched is not None
    assert rounds is not None
    times = own_time(matched, traces, found.clocks, rounds, arrival)
    own, length = times.own, (rounds.end - rounds.start).astype(np.float64)
    present = matched.present & usable
    latest = np.where(present, arrival, np.iinfo(np.int64).min).argmax(axis=1)
    result = []
    columns = np.flatnonzero(usable).tolist()
    known = OwnTimes(spent, rounds, times.elsewhere, columns) if len(columns) > 1 and len(rounds) else None
    for column, rank in enumerate(found.ranks):
        others = [other for other in columns if other != column]
        if not usable[column] or known is None:
            result.append(Lateness(rank, None, 0, 0, 0, int((latest == column).sum()), []))
            continue
        excess = own[column] - np.median(own[others], axis=0)
        whole = length[column]
        cost = None
        if len(rounds) > 1:
            cost = stats.compare_pairs(
                np.maximum(whole - excess, 1.0), np.maximum(whole, 1.0), tolerance=TOLERANCE
            )
        result.append(
            Lateness(
                rank,
                cost,
                round(float(np.median(excess))),
                round(float(np.median(times.waited[column]))),
                round(float(np.median(times.handed[column]))),
                int((latest == column).sum()),
                known.excess(column),
            )
        )
    return result
