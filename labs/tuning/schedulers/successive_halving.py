"""Successive halving: of the trials of a rung the best 1/eta go on, once all of them are there.

Source: Jamieson and Talwalkar 2016, "Non-stochastic Best Arm Identification and Hyperparameter Optimization",
figure 3; with eta as in Li et al. 2018, "Hyperband", algorithm 1.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from labs.tuning.schedulers.job import Job, Scheduler, rungs
from labs.tuning.space import Point


class SuccessiveHalving(Scheduler):
    """trials: which of the points compete (all by default). A rung of fewer than eta trials sends one on."""

    def __init__(
        self, points: Sequence[Point], least: int, most: int, eta: int, trials: Sequence[int] | None = None
    ) -> None:
        super().__init__(points, most)
        self.rungs, self.eta, self.rung = rungs(least, most, eta), eta, 0
        self.waiting = deque(range(len(self.points)) if trials is None else trials)
        if not self.waiting:
            raise ValueError("no trials compete: give at least one")
        self.here: list[tuple[float, int]] = []

    def _next(self) -> Job | None:
        return self.job(self.waiting.popleft(), self.rungs[self.rung]) if self.waiting else None

    def _heard(self, job: Job, loss: float) -> None:
        self.here.append((loss, job.trial))
        if self.waiting or self.running or self.rung + 1 == len(self.rungs):
            return
        count = max(1, len(self.here) // self.eta)
        self.waiting.extend(trial for _, trial in sorted(self.here)[:count])
        self.here.clear()
        self.rung += 1

    @property
    def _exhausted(self) -> bool:
        return not self.waiting and self.rung + 1 == len(self.rungs)
