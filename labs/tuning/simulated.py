"""Workers on a simulated clock: losses from recorded curves, seconds from a formula, some jobs late."""

from __future__ import annotations

import heapq
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from labs.tuning.schedulers.job import Job, Losses


@dataclass(frozen=True)
class Late:
    """With ``probability`` a job takes ``factor`` times as long: drawn by trial and step, so that every
    scheduler meets the same."""

    probability: float = 0.0
    factor: float = 1.0
    seed: int = 0

    def times(self, job: Job) -> float:
        drawn = random.Random(f"{self.seed} {job.trial} {job.stop}").random()
        return self.factor if drawn < self.probability else 1.0


class SimulatedWorkers:
    """curves: of each trial, steps -> loss; step_s, job_s: seconds of a step, and of a job besides.

    ValueError: no workers, or a job that goes past what was recorded.
    """

    def __init__(
        self,
        count: int,
        curves: Sequence[Mapping[int, float]],
        step_s: float,
        job_s: float = 0.0,
        late: Late | None = None,
    ) -> None:
        if count < 1:
            raise ValueError(f"count={count} workers: a search needs at least 1")
        self.count, self.curves, self.step_s, self.job_s = count, curves, step_s, job_s
        self.late = late or Late()
        self.clock = 0.0
        self.ends: list[tuple[float, int, Job]] = []

    def now(self) -> float:
        return self.clock

    def submit(self, worker: int, job: Job) -> None:
        if job.stop not in self.curves[job.trial]:
            raise ValueError(f"no loss of trial {job.trial} was recorded after {job.stop} steps")
        seconds = self.job_s + self.step_s * job.steps * self.late.times(job)
        heapq.heappush(self.ends, (self.clock + seconds, worker, job))

    def wait(self) -> tuple[int, Losses]:
        self.clock, worker, job = heapq.heappop(self.ends)
        curve = self.curves[job.trial]
        return worker, {step: loss for step, loss in curve.items() if job.start < step <= job.stop}
