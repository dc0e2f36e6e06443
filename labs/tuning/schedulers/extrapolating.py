"""Random search that gives a trial up once its curve, drawn on to the end, does not reach the best one.

Source: Domhan et al. 2015, "Speeding Up Automatic Hyperparameter Optimization of Deep Neural Networks by
Extrapolation of Learning Curves". Theirs is a distribution over eleven families of curves; here it is one,
and a margin in place of a distribution.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from labs.tuning.extrapolation import extrapolated
from labs.tuning.schedulers.job import Job, Scheduler, ranked
from labs.tuning.space import Point


class Extrapolating(Scheduler):
    """looks: steps at which a curve is drawn on; margin: nats by which it may miss the best end so far.

    ValueError: looks that do not increase from 1 to below ``most``, or a negative margin.
    """

    def __init__(self, points: Sequence[Point], looks: Sequence[int], most: int, margin: float) -> None:
        super().__init__(points, most)
        edges = [0, *looks, most]
        if any(low >= high for low, high in itertools.pairwise(edges)):
            raise ValueError(f"looks={list(looks)} have to increase, from 1 to below most={most}")
        if margin < 0:
            raise ValueError(f"margin={margin} nats is negative")
        self.stops, self.margin = [*looks, most], margin
        self.going: list[int] = []  # trials that are to go on, the longest trained first
        self.entered = 0
        self.given_up: set[int] = set()

    def _next(self) -> Job | None:
        if self.going:
            trial = self.going.pop(0)
        elif self.entered < len(self.points):
            trial = self.entered
            self.entered += 1
        else:
            return None
        done = self.done.get(trial, 0)
        return self.job(trial, next(stop for stop in self.stops if stop > done))

    def _heard(self, job: Job, loss: float) -> None:
        if job.stop == self.most:
            return
        best = self.best()
        curve = self.losses[job.trial]
        said = ranked(extrapolated(list(curve), list(curve.values()), self.most))
        if said == float("inf") or (best is not None and said > best[1] + self.margin):
            self.given_up.add(job.trial)
        else:
            self.going.append(job.trial)
            self.going.sort(key=lambda trial: -self.done[trial])

    @property
    def _exhausted(self) -> bool:
        return not self.going and self.entered == len(self.points)
