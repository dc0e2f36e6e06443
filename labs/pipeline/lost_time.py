"""Where a step's time goes: computing, the bubble (a rank waits for another), and overhead (it could begin
and has not yet)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from labs.lab import Recorder, Results, values_of

if TYPE_CHECKING:
    from parallel.schedules import Schedule, Timeline

Span = tuple[float, float]


@dataclass(frozen=True)
class Lost:
    """bubble: share of all ranks' time in which they wait for what another has not computed yet. overhead: s
    for each action between when it could begin and when it did."""

    bubble: float
    overhead: float


@dataclass(frozen=True)
class Stamps:
    """When each rank did each of its actions (begin, end), in the order of the schedule, on one clock."""

    ranks: Sequence[Sequence[Span]]

    @cached_property
    def begin(self) -> float:
        return min(spans[0][0] for spans in self.ranks)

    @cached_property
    def step(self) -> float:
        """Seconds from the first beginning to the last end."""
        return max(spans[-1][1] for spans in self.ranks) - self.begin

    def lost(self, schedule: Schedule) -> Lost:
        """Of the schedule's actions: a result counts as there when its producer has ended."""
        from parallel.schedules.flat import flatten, needs

        flat = flatten(schedule)
        need = needs(flat).tolist()
        spans = [span for rank in self.ranks for span in rank]
        waiting = overhead = 0.0
        row = 0
        for rank in self.ranks:
            free = self.begin
            for begin, end in rank:
                ready = spans[need[row]][1] if need[row] >= 0 else free
                waiting += min(max(0.0, ready - free), begin - free)
                overhead += max(0.0, begin - max(ready, free))
                free = end
                row += 1
            waiting += self.begin + self.step - free
        return Lost(waiting / (len(self.ranks) * self.step), overhead / len(spans))

    def record(self, schedule: Schedule, recorder: Recorder) -> None:
        """All of it, on rank 0: ``spans`` reads it back."""
        lost = self.lost(schedule)
        recorder.record("bubble", lost.bubble, "ratio")
        recorder.record("overhead", lost.overhead, "s")
        for rank, spans in enumerate(self.ranks):
            for begin, end in spans:
                recorder.record(f"rank{rank}_begin", begin - self.begin, "s")
                recorder.record(f"rank{rank}_end", end - self.begin, "s")


def of_timeline(timeline: Timeline) -> Lost:
    """The same of a simulation."""
    edges = list(zip(timeline.start.tolist(), timeline.end.tolist(), strict=True))
    lengths = map(len, timeline.schedule.ranks)
    ends = [0, *accumulate(lengths)]
    return Stamps([edges[first:last] for first, last in pairwise(ends)]).lost(timeline.schedule)


def spans(results: Results, variant: str, rank: int) -> list[Span]:
    """What was recorded of a rank."""
    edges = (values_of(results, variant, f"rank{rank}_{edge}_s") for edge in ("begin", "end"))
    return list(zip(*edges, strict=True))
