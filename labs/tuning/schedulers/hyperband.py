"""Hyperband: successive halving from several first rungs, for where it is not known which one can be trusted.

Source: Li et al. 2018, "Hyperband: A Novel Bandit-Based Approach to Hyperparameter Optimization",
algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from labs.tuning.schedulers.job import Job, Scheduler, rungs
from labs.tuning.schedulers.successive_halving import SuccessiveHalving
from labs.tuning.space import Point


def brackets(least: int, most: int, eta: int) -> list[tuple[int, int]]:
    """(trials, first rung) of each bracket; the boldest first: n = ceil((s_max + 1) / (s + 1) eta^s)."""
    steps = rungs(least, most, eta)
    largest = len(steps) - 1
    return [(-(-(largest + 1) * eta**s // (s + 1)), steps[largest - s]) for s in range(largest, -1, -1)]


def shares(points: int, least: int, most: int, eta: int) -> list[tuple[int, int]]:
    """The brackets with ``points`` trials in all, in the same proportions: so that Hyperband can be held
    against searches of the same points. A bracket that would get none is left out."""
    whole = brackets(least, most, eta)
    total = sum(count for count, _ in whole)
    edges, seen = [0], 0
    for count, _ in whole:
        seen += count
        edges.append(round(points * seen / total))
    found = [(high - low, first) for low, high, (_, first) in zip(edges, edges[1:], whole, strict=False)]
    return [(count, first) for count, first in found if count]


class Hyperband(Scheduler):
    """Brackets begin in turn, and a worker that one has no job for asks the next."""

    def __init__(self, points: Sequence[Point], least: int, most: int, eta: int) -> None:
        super().__init__(points, most)
        self.brackets: list[SuccessiveHalving] = []
        begin = 0
        for count, first in shares(len(self.points), least, most, eta):
            trials = range(begin, begin + count)
            self.brackets.append(SuccessiveHalving(self.points, first, most, eta, trials))
            begin += count

    def _next(self) -> Job | None:
        for bracket in self.brackets:
            job = bracket.next_job()
            if job is not None:
                return job
        return None

    def _heard(self, job: Job, loss: float) -> None:
        bracket = next(each for each in self.brackets if each.running.get(job.trial) == job)
        bracket.report(job, {job.stop: loss})

    @property
    def _exhausted(self) -> bool:
        return all(bracket.finished for bracket in self.brackets)
