"""Population based training: the worst members take over the state and the point of the best, and change it.

What it finds is a schedule of hyperparameters, not a point. Here all members meet after each interval; in the
paper each looks when it is ready. That makes a run repeatable, and costs the wait for the slowest.

Source: Jaderberg et al. 2017, "Population Based Training of Neural Networks", algorithm 1, truncation
selection (section 4.1.1).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence

from labs.tuning.schedulers.job import Job, Scheduler
from labs.tuning.space import Point, mutated

WORST = 4
"""One in so many is replaced."""


class PopulationBased(Scheduler):
    """The points are the members; ``interval``: steps between two meetings. ValueError: fewer than 2 members
    or an interval that is not from 1 to ``most``."""

    def __init__(self, points: Sequence[Point], interval: int, most: int, seed: int) -> None:
        super().__init__(points, most)
        if len(self.points) < 2:
            raise ValueError(f"{len(self.points)} member: a population has at least 2")
        if not 1 <= interval <= most:
            raise ValueError(f"interval={interval} steps: it is from 1 to the {most} of a training")
        self.interval, self.generator = interval, random.Random(seed)
        self.stop = interval
        self.waiting = deque(self.job(trial, interval) for trial in range(len(self.points)))
        self.here: list[tuple[float, int]] = []
        self.copied = 0

    def _next(self) -> Job | None:
        return self.waiting.popleft() if self.waiting else None

    def _heard(self, job: Job, loss: float) -> None:
        self.here.append((loss, job.trial))
        if len(self.here) < len(self.points) or self.stop == self.most:
            return
        start, self.stop = self.stop, min(self.stop + self.interval, self.most)
        order = [trial for _, trial in sorted(self.here)]
        self.here.clear()
        count = max(1, len(order) // WORST)
        sources = {trial: trial for trial in order}
        for loser in order[-count:]:
            sources[loser] = self.generator.choice(order[:count])
            self.copied += 1
        old = list(self.points)
        for trial, source in sources.items():
            if source != trial:
                self.points[trial] = mutated(old[source], self.generator)
        self.waiting.extend(
            Job(trial, self.points[trial], start, self.stop, sources[trial]) for trial in sorted(sources)
        )

    @property
    def counted(self) -> Mapping[str, int]:
        return {"taken_over": self.copied}

    @property
    def _exhausted(self) -> bool:
        return len(self.here) == len(self.points) and self.stop == self.most
