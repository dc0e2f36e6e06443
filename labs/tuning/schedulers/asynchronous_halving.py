"""ASHA: a trial goes on as soon as it is among the best 1/eta of those that have come to its rung.

Nobody waits for a rung to fill. The price: of the first trials some go on that a full rung would not send on.
This is the paper's variant, by promotion; Ray Tune's ``ASHAScheduler`` is another, by stopping: each trial
runs on unless it is among the worse at a rung, so that the first to come there pass unseen.

Source: Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning", algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence

from labs.tuning.schedulers.job import Job, Rank, Scheduler, by_loss, ranked, rungs
from labs.tuning.space import Point


class AsynchronousHalving(Scheduler):
    """The points enter the first rung in their order, when nothing can be promoted. rank: what a curve is
    worth at a rung, the least best: the loss there, or where it leads to (``by_extrapolation``)."""

    def __init__(
        self, points: Sequence[Point], least: int, most: int, eta: int, rank: Rank = by_loss
    ) -> None:
        super().__init__(points, most)
        self.rungs, self.eta, self.rank = rungs(least, most, eta), eta, rank
        self.here: list[list[tuple[float, int]]] = [[] for _ in self.rungs]
        self.promoted: list[set[int]] = [set() for _ in self.rungs]
        self.entered = 0

    def _promotable(self) -> tuple[int, int] | None:
        """(rung, trial) of the highest rung that has one to send on."""
        for rung in range(len(self.rungs) - 2, -1, -1):
            count = len(self.here[rung]) // self.eta
            for _, trial in sorted(self.here[rung])[:count]:
                if trial not in self.promoted[rung]:
                    return rung, trial
        return None

    def _next(self) -> Job | None:
        found = self._promotable()
        if found is not None:
            rung, trial = found
            self.promoted[rung].add(trial)
            return self.job(trial, self.rungs[rung + 1])
        if self.entered < len(self.points):
            self.entered += 1
            return self.job(self.entered - 1, self.rungs[0])
        return self._last()

    def _last(self) -> Job | None:
        """Where nothing runs and nobody has come to the end (a rung has fewer than eta): the best goes on."""
        if self.running or self.here[-1]:
            return None
        rung = max(place for place, trials in enumerate(self.here) if trials)
        trial = min(self.here[rung])[1]
        self.promoted[rung].add(trial)
        return self.job(trial, self.rungs[rung + 1])

    def _heard(self, job: Job, loss: float) -> None:
        worth = ranked(self.rank(self.losses[job.trial]))
        self.here[self.rungs.index(job.stop)].append((worth, job.trial))

    @property
    def _exhausted(self) -> bool:
        return self.entered == len(self.points) and bool(self.here[-1]) and self._promotable() is None
