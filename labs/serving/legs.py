"""Where time goes between who asks and the steps that serve: read from what workers and service saw.

  sent -> (submit or travel) -> step -> pack -> free -> (post) -> next step
                                          \\--> (deliver) -> who asked

All on one clock, that of the host.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from labs.serving.costs import Ran
from labs.serving.counted import Seen
from labs.serving.worker import Report


def started(report: Report) -> float:
    """When the worker turned to this step: before it stored what was handed over to it."""
    return report.began - sum(seconds for _, seconds in report.stored)


def computes(report: Report) -> bool:
    return report.ended > report.began


def steps_of(seen: Seen, workers: int) -> Iterator[Ran]:
    """Every step, with the shares of the other workers that read and wrote meanwhile, and its worker's rest
    before it."""
    busy: dict[tuple[int, bool], list[tuple[float, float]]] = defaultdict(list)
    for worker, report in seen.reports:
        if computes(report):
            busy[worker, report.shape.prompts > 0].append((report.began, report.ended))
    free: dict[int, float] = {}
    for worker, report in seen.reports:
        rest = max(0.0, started(report) - free.get(worker, started(report)))
        free[worker] = report.free
        if computes(report):
            began, ended = report.began, report.ended
            length = (ended - began) * max(1, workers - 1)
            reads, writes = (
                sum(
                    _overlap(spans, began, ended) / length
                    for (other, prompts), spans in busy.items()
                    if other != worker and prompts == kind
                )
                for kind in (True, False)
            )
            yield Ran(report.shape, ended - began, reads, writes, rest)


def _overlap(spans: Sequence[tuple[float, float]], began: float, ended: float) -> float:
    """Seconds of these spans, which are in order, that lie between."""
    total = 0.0
    for index in range(max(0, bisect_left(spans, (began, began)) - 1), len(spans)):
        low, high = spans[index]
        if low >= ended:
            break
        total += max(0.0, min(high, ended) - max(low, began))
    return total


@dataclass
class Legs:
    """Seconds of each way, behind the bytes where it depends on them. submits, travels: until a worker that
    had nothing to do turns to the step; to one that works they end at the same time and are seen by nobody.
    posts: between two steps of one that works."""

    submits: list[tuple[float, float]] = field(default_factory=list)  # (rest of the worker, seconds)
    delivers: list[float] = field(default_factory=list)  # of steps that only write
    first_delivers: list[float] = field(default_factory=list)  # of steps with prompts
    posts: list[float] = field(default_factory=list)
    packs: list[tuple[int, float]] = field(default_factory=list)
    travels: list[tuple[int, float]] = field(default_factory=list)
    stores: list[tuple[int, float]] = field(default_factory=list)

    def read(self, seen: Seen) -> None:
        trips = defaultdict(list)
        for trip in seen.trips:
            trips[trip.report].append(trip)
        before: dict[int, Report] = {}
        for index, (worker, report) in enumerate(seen.reports):
            if not computes(report):
                before[worker] = report  # it has been given its layout
                continue
            (self.first_delivers if report.shape.prompts else self.delivers).append(seen.delivers[index])
            self.stores += report.stored
            last, new = before.get(worker), trips[index]
            before[worker] = report
            if last is not None and (last.held or any(trip.came < last.free for trip in new)):
                if all(trip.came < last.free for trip in new):
                    self.posts.append(started(report) - last.free)
            elif len(new) == 1:
                seconds = started(report) - new[0].sent
                if new[0].size:
                    self.travels.append((new[0].size, seconds))
                else:
                    rest = new[0].sent - last.free if last is not None else 0.0
                    self.submits.append((max(0.0, rest), seconds))
        self.packs += seen.packs
