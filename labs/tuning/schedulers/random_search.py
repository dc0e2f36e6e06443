"""Every point to the end (Bergstra and Bengio 2012): what the others are measured against."""

from __future__ import annotations

from labs.tuning.schedulers.job import Job, Scheduler


class RandomSearch(Scheduler):
    """In the order of the points."""

    def _next(self) -> Job | None:
        trial = len(self.done) + len(self.running)
        return self.job(trial, self.most) if trial < len(self.points) else None

    def _heard(self, job: Job, loss: float) -> None:
        pass

    @property
    def _exhausted(self) -> bool:
        return len(self.done) == len(self.points)
