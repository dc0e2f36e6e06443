"""The most promising curve goes on; those that do not lead below the best end are given up.

Every trial is trained to the first look. Then whoever's curve leads lowest goes on to the next one, until the
curves of all that are left lead to worse than what has been reached.

Sources: Domhan et al. 2015, "Speeding Up Automatic Hyperparameter Optimization of Deep Neural Networks by
Extrapolation of Learning Curves", for giving up; Swersky et al. 2014, "Freeze-Thaw Bayesian Optimization",
for going on with the most promising. Both have distributions over curves; here it is one, and a margin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from labs.tuning.schedulers.job import Job, Scheduler, by_extrapolation, ranked
from labs.tuning.space import Point


class Extrapolating(Scheduler):
    """looks: steps at which a curve is drawn on; margin: nats by which it may miss the best end so far.

    ValueError: looks that do not increase from 1 to below ``most``, or a negative margin.
    """

    def __init__(self, points: Sequence[Point], looks: Sequence[int], most: int, margin: float) -> None:
        super().__init__(points, most)
        if any(low >= high for low, high in pairwise([0, *looks, most])):
            raise ValueError(f"looks={list(looks)} have to increase, from 1 to below most={most}")
        if margin < 0:
            raise ValueError(f"margin={margin} nats is negative")
        self.stops, self.margin, self.rank = [*looks, most], margin, by_extrapolation(most)
        self.promise: dict[int, float] = {}  # trial that waits -> the loss that its curve leads to
        self.entered = 0
        self.given_up: set[int] = set()

    def _next(self) -> Job | None:
        if self.entered < len(self.points):
            self.entered += 1
            return self.job(self.entered - 1, self.stops[0])
        if not self.promise:
            return None
        trial = min(self.promise, key=self.promise.__getitem__)
        del self.promise[trial]
        done = self.done[trial]
        return self.job(trial, next(stop for stop in self.stops if stop > done))

    def _heard(self, job: Job, loss: float) -> None:
        if job.stop < self.most:
            self.promise[job.trial] = ranked(self.rank(self.losses[job.trial]))
        best = self.best()
        bound = math.inf if best is None else best[1] + self.margin
        hopeless = {trial for trial, said in self.promise.items() if said == math.inf or said > bound}
        self.given_up |= hopeless
        for trial in hopeless:
            del self.promise[trial]

    @property
    def counted(self) -> Mapping[str, int]:
        return {"given_up": len(self.given_up)}

    @property
    def _exhausted(self) -> bool:
        return not self.promise and self.entered == len(self.points)
