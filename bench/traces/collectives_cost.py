"""What each kind of collective costs: skew and transfer apart, bytes a second, and who comes last to it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench import stats
from bench.traces.clocks import RankClock
from bench.traces.collectives import Matched
from bench.traces.events import Trace
from bench.traces.ranks_late import TOLERANCE, Excess, Spent, excess_by_collective


@dataclass(frozen=True)
class Collective:
    """All calls of one kind. bytes: of a call, as the rank with most of them recorded it (-1 unknown).

    ranks: how many take part. skew_ns, transfer_ns: medians of the calls; transfer is -1 where ends were not
    recorded. algorithm_bandwidth, bus_bandwidth: bytes a second, None where unknown (nccl-tests' definitions,
    see ``bus_factor``). late_rank: the one certain to be late for it, None where none is; late_ns:
    how much later than their median; operation: what it did meanwhile longer than they did.
    """

    operation: str
    group: str
    bytes: int
    ranks: int
    calls: int
    skew_ns: int
    transfer_ns: int
    waited_ns: int
    algorithm_bandwidth: float | None
    bus_bandwidth: float | None
    late_rank: int | None = None
    late_ns: int = 0
    late_operation: Excess | None = None


def costs(
    matched: Matched,
    traces: Sequence[Trace],
    spent: Sequence[Spent],
    clocks: Sequence[RankClock],
    world: int,
    arrival: np.ndarray,
    end: np.ndarray,
) -> list[Collective]:
    """A row for each kind of collective, the most waited for first.

    arrival, end: int64 (collectives, ranks) nanoseconds in one time. world: ranks of the job, -1 unknown.
    """
    usable = np.array([clock.how != "unknown" for clock in clocks])
    exact = max((clock.exact for clock in clocks), default=0)
    on_device = any(trace.on_device()[matched.row[:, c]].any() for c, trace in enumerate(traces))
    rows = []
    for code, (operation, group, _) in enumerate(matched.keys):
        calls = np.flatnonzero(matched.key == code)
        present = matched.present[calls] & usable
        calls, present = calls[present.sum(axis=1) > 1], present[present.sum(axis=1) > 1]
        if not len(calls):
            continue
        came = np.where(present, arrival[calls].astype(np.float64), np.nan)
        last = np.nanmax(came, axis=1)
        left = np.where(present & matched.whole, end[calls].astype(np.float64), np.nan)
        waits = np.clip(last[:, None] - came, 0, None)
        if matched.whole.all():
            waits = np.minimum(waits, np.maximum(left - came, 0))
        transfer = -1.0
        if (present & matched.whole).any(axis=1).all():
            transfer = float(np.median(np.maximum(np.nanmedian(left, axis=1) - last, 0)))
        size, members = int(np.median(matched.bytes[calls])), int(present.any(axis=0).sum())
        taking_part = _group_size(group, members, world)
        algorithm = None
        if size > 0 and transfer > exact:
            moved = size if on_device else total_bytes(operation, size, taking_part)
            algorithm = moved / (transfer * 1e-9)
        late = _late_in(came, exact)
        rank = None if late is None else matched.ranks[late[0]]
        rows.append(
            Collective(
                operation,
                group,
                size,
                taking_part,
                len(calls),
                round(float(np.median(last - np.nanmin(came, axis=1)))),
                round(transfer),
                round(float(np.nansum(waits))),
                algorithm,
                None if algorithm is None else algorithm * bus_factor(operation, taking_part),
                rank,
                0 if late is None else round(late[1]),
                None if late is None else excess_by_collective(spent, traces, matched, code, late[0]),
            )
        )
    return sorted(rows, key=lambda row: -row.waited_ns)


def _late_in(came: np.ndarray, exact: int) -> tuple[int, float] | None:
    """(column, ns) of the rank that for certain arrives after the median of the others, by more than its
    clock may be off and ``TOLERANCE`` of the time from one call to the next; None without one."""
    least = float(exact)
    if len(came) > 1:
        least = max(least, TOLERANCE * float(np.median(np.diff(np.nanmax(came, axis=1)))))
    best = None
    for column in np.flatnonzero(~np.isnan(came).all(axis=0)).tolist():
        others = np.delete(came, column, axis=1)
        both = ~np.isnan(came[:, column]) & ~np.isnan(others).all(axis=1)
        if both.sum() < 2:
            continue
        middle, low, _ = stats.center_interval(came[both, column] - np.nanmedian(others[both], axis=1))
        if low > least and (best is None or middle > best[1]):
            best = column, middle
    return best


def _group_size(group: str, matched: int, world: int) -> int:
    """Ranks of a group: as its name says ("0 (default_pg) of 8"), all of the job for a nameless one."""
    size = re.search(r" of (\d+)$", group)
    if size:
        return int(size[1])
    return max(matched, world) if not group else matched


def total_bytes(operation: str, held: int, ranks: int) -> int:
    """nccl-tests' size S from the input of one rank, which is what gloo records: of an all_gather (and a
    gather) all that is gathered, else what the rank holds. Bytes of NCCL's kernels are S already."""
    return held * ranks if operation in ("all_gather", "gather") else held


def bus_factor(operation: str, ranks: int) -> float:
    """What turns bytes / time into the bandwidth of the slowest link, whatever the number of ranks.

    nccl-tests, doc/PERFORMANCE.md: all_reduce 2(n-1)/n; reduce_scatter, all_gather, all_to_all (and gather,
    scatter) (n-1)/n; broadcast, reduce and messages 1.
    """
    if operation == "all_reduce":
        return 2 * (ranks - 1) / ranks
    if operation in ("reduce_scatter", "all_gather", "all_to_all", "gather", "scatter"):
        return (ranks - 1) / ranks
    return 1.0
