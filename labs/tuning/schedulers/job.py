"""What a scheduler asks for and is told, and the ground that all of them stand on."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from labs.tuning.extrapolation import extrapolated
from labs.tuning.space import Point

Losses = Mapping[int, float]
"""Steps done -> validation loss in nats, in increasing order of the steps; not empty."""

Rank = Callable[[Losses], float]
"""What a trial's losses so far are worth; the least is best."""


@dataclass(frozen=True)
class Job:
    """Train ``trial`` from ``start`` to ``stop`` steps with ``point``.

    source: the trial whose state after ``start`` steps to go on from (itself, or another in population based
        training); None: from the beginning, and ``start`` is 0.
    """

    trial: int
    point: Point
    start: int
    stop: int
    source: int | None = None

    @property
    def steps(self) -> int:
        return self.stop - self.start


def ranked(loss: float) -> float:
    """A loss to sort by: one that is not a number is the worst of all."""
    return loss if math.isfinite(loss) else math.inf


def by_loss(losses: Losses) -> float:
    """The last one."""
    return list(losses.values())[-1]


def by_extrapolation(most: int) -> Rank:
    """The loss after ``most`` steps, from the curve so far."""
    return lambda losses: extrapolated(list(losses), list(losses.values()), most)


class Scheduler(ABC):
    """The state of one search over ``points``, all of which are trained for ``most`` steps at most."""

    def __init__(self, points: Sequence[Point], most: int) -> None:
        if not points:
            raise ValueError("no points to search: give at least one")
        if most < 1:
            raise ValueError(f"most={most} steps: a trial takes at least 1")
        self.points = list(points)
        self.most = most
        self.running: dict[int, Job] = {}
        self.done: dict[int, int] = {}  # trial -> steps
        self.losses: dict[int, dict[int, float]] = {}

    @abstractmethod
    def _next(self) -> Job | None: ...

    @abstractmethod
    def _heard(self, job: Job, loss: float) -> None: ...

    @property
    @abstractmethod
    def _exhausted(self) -> bool:
        """Nothing is left to be asked for, now or after what is running."""

    @property
    def finished(self) -> bool:
        return not self.running and self._exhausted

    def next_job(self) -> Job | None:
        """The next job for an idle worker, or None. The same trial never runs twice at once."""
        job = self._next()
        if job is not None:
            if job.trial in self.running:
                raise RuntimeError(f"trial {job.trial} is running: {self.running[job.trial]}")
            self.running[job.trial] = job
        return job

    def report(self, job: Job, losses: Losses) -> None:
        """What the job found. ValueError: it was not asked for, or its last loss is missing."""
        if self.running.get(job.trial) != job:
            raise ValueError(f"{job} was not asked for or is reported twice; running: {self.running}")
        if job.stop not in losses:
            raise ValueError(f"{job} reports losses after {list(losses)} steps, and not after {job.stop}")
        del self.running[job.trial]
        self.done[job.trial] = job.stop
        self.losses.setdefault(job.trial, {}).update(losses)
        self._heard(job, ranked(losses[job.stop]))

    def job(self, trial: int, stop: int) -> Job:
        """The trial from where it is to ``stop``."""
        start = self.done.get(trial, 0)
        return Job(trial, self.points[trial], start, stop, trial if start else None)

    @property
    def counted(self) -> Mapping[str, int]:
        """name -> of what only this kind of search does."""
        return {}

    def best(self) -> tuple[int, float] | None:
        """(trial, loss) with the smallest loss after ``most`` steps; None: no loss there is a number."""
        ended = [
            (ranked(losses[self.most]), trial)
            for trial, losses in self.losses.items()
            if self.most in losses and math.isfinite(losses[self.most])
        ]
        return (min(ended)[1], min(ended)[0]) if ended else None


def rungs(least: int, most: int, eta: int) -> list[int]:
    """Steps at which trials are compared: least, eta least, eta^2 least, ... and most at the end.

    ValueError: eta below 2, least below 1 or most below least.
    """
    if eta < 2:
        raise ValueError(f"eta={eta}: of eta trials one goes on, so it is at least 2")
    if least < 1:
        raise ValueError(f"least={least} steps: the first rung is at least 1")
    if most < least:
        raise ValueError(f"most={most} steps are fewer than least={least}: the last rung is the largest")
    found = []
    while least < most:
        found.append(least)
        least *= eta
    return [*found, most]
