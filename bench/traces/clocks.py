"""One time for all ranks: what must be added to the clock of each, from the collectives they share.

Processes of one host read one clock; those of several hosts do not, and profilers do not say by how much
they differ. But nobody leaves an all_reduce before the last rank has arrived, and all leave at about the same
time:

- *bound*: end on rank a >= start on rank b, in one time, for every shared collective and both ways round. The
  clocks' difference therefore lies in [max(start_b - end_a), min(end_b - start_a)]; that is certain.
- *estimate*: the median difference of the ends, with its interval from the statistical engine, in the bound.

Where the bounds hold for no constant difference, or the first and the second half of the record differ by
more than their intervals, one clock is faster: a drift is estimated from the medians of the halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench import stats
from bench.traces.collectives import Matched
from bench.traces.events import Trace

_FEW = 4  # ends from which a median and its interval say something
_SHARED_NS = 20_000  # ranks of one host may be this far off in ends alone: they leave one after the other


@dataclass(frozen=True)
class RankClock:
    """What to add to a rank's times: ``offset`` + ``drift`` * (time - ``middle``).

    offset, exact: nanoseconds; the true offset is within ``exact`` of it (95 %). drift: ns a ns. collectives:
    how many it rests on. how: "reference", "one host", "agrees", "aligned", or "unknown" (nothing links the
    rank to the others: its times mean nothing beside theirs).
    """

    offset: int = 0
    exact: int = 0
    drift: float = 0.0
    middle: int = 0
    collectives: int = 0
    how: str = "reference"

    def correct(self, time: np.ndarray) -> np.ndarray:
        """int64 nanoseconds in the reference's time."""
        shift = self.offset + np.rint(self.drift * (time - self.middle)).astype(np.int64)
        return time + shift


def align(matched: Matched, traces: Sequence[Trace]) -> list[RankClock]:
    """A clock for each rank, against the first rank; through others where the two share no collective."""
    found: dict[int, RankClock] = {0: RankClock()} if traces else {}
    shared = _shared_counts(matched)
    hosts = [trace.facts.get("host", "") for trace in traces]
    while len(found) < len(traces):
        left = [column for column in range(len(traces)) if column not in found]
        base, column = max(
            ((b, c) for b in found for c in left),
            key=lambda pair: (shared[pair], hosts[pair[0]] == hosts[pair[1]], -pair[1], -pair[0]),
        )
        same_host = bool(hosts[base]) and hosts[base] == hosts[column] and matched.origin_ns > 0
        if shared[base, column] == 0:
            found[column] = RankClock(how="one host") if same_host else RankClock(how="unknown")
        else:
            found[column] = _against(matched, base, found[base], column, same_host)
    return [found[column] for column in range(len(traces))]


def _shared_counts(matched: Matched) -> np.ndarray:
    """int64 (ranks, ranks): synchronising collectives whose ends both recorded."""
    present = matched.present & matched.whole & matched.synchronizing[:, None]
    return present.T.astype(np.int64) @ present.astype(np.int64)


def _against(matched: Matched, base: int, clock: RankClock, column: int, same_host: bool) -> RankClock:
    """The clock of a rank against one that is known already."""
    rows = matched.present[:, base] & matched.present[:, column] & matched.synchronizing
    start, end = clock.correct(matched.start[rows, base]), clock.correct(matched.end[rows, base])
    begun, ended = matched.start[rows, column], matched.end[rows, column]
    low, high = int((start - ended).max()), int((end - begun).min())  # of what to add to this rank's times
    count = len(start)
    if same_host:  # what contradicts it was not one collective
        return RankClock(collectives=count, how="one host")
    difference = (end - ended).astype(np.float64)
    middle, below, above = _median(difference)
    comparable = matched.origin_ns > 0
    near = below <= 0 <= above or (low <= 0 <= high and min(abs(below), abs(above)) <= _SHARED_NS)
    if comparable and near:
        return RankClock(exact=int(max(abs(below), abs(above))), collectives=count, how="agrees")
    drift, centre = _drift(ended, difference)
    if drift:
        rest = difference - drift * (ended - centre)
        middle, below, above = _median(rest)
    elif low <= high:
        middle = min(max(middle, low), high)
        below, above = max(min(below, middle), low), min(max(above, middle), high)
    reach = int(np.ceil(max(above - middle, middle - below))) + clock.exact
    return RankClock(round(middle), reach, drift, int(centre), count, "aligned")


def _median(values: np.ndarray) -> tuple[float, float, float]:
    """(median, low, high); of few values their range."""
    if len(values) < _FEW:
        return float(np.median(values)), float(values.min()), float(values.max())
    return stats.center_interval(values.tolist())


def _drift(time: np.ndarray, difference: np.ndarray) -> tuple[float, float]:
    """(ns a ns, the time at which the offset is stated); 0 where none shows."""
    half = len(time) // 2
    if half < 2 * _FEW:
        return 0.0, float(np.median(time))
    order = np.argsort(time, kind="stable")
    early, late = order[:half], order[half:]
    first, last = _median(difference[early]), _median(difference[late])
    centre = float(np.mean(time))
    if first[1] <= last[2] and last[1] <= first[2]:
        return 0.0, centre
    return (last[0] - first[0]) / float(time[late].mean() - time[early].mean()), centre
