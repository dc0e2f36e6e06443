"""A scheduler on workers, real or simulated: whoever is idle gets the next job, until all is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from labs.tuning.schedulers import Scheduler
from labs.tuning.schedulers.job import Job, Losses


class Workers(Protocol):
    """count: of workers, numbered from 0."""

    count: int

    def now(self) -> float:
        """Seconds on the workers' clock."""

    def submit(self, worker: int, job: Job) -> None:
        """Begin; the worker is idle."""

    def wait(self) -> tuple[int, Losses]:
        """The next worker to end its job, and what it found. TimeoutError names who is waited for."""


@dataclass(frozen=True)
class Ended:
    """A job that a worker ran. begin, end: seconds from the start of the search."""

    job: Job
    worker: int
    begin: float
    end: float
    losses: Losses


@dataclass(frozen=True)
class Trace:
    """A search that is over. seconds: from its start to the last report."""

    ended: Sequence[Ended]
    workers: int
    seconds: float

    @property
    def steps(self) -> int:
        return sum(each.job.steps for each in self.ended)

    @property
    def utilisation(self) -> float:
        """Share of the workers' time in which they had a job."""
        busy = sum(each.end - each.begin for each in self.ended)
        return busy / (self.workers * self.seconds) if self.seconds else 1.0


def search(scheduler: Scheduler, workers: Workers) -> Trace:
    """Run it to the end. RuntimeError: the scheduler is not finished, and nothing runs or can begin."""
    origin = workers.now()
    idle = list(range(workers.count))
    flying: dict[int, tuple[Job, float]] = {}
    ended: list[Ended] = []
    while not scheduler.finished:
        while idle and (job := scheduler.next_job()) is not None:
            worker = idle.pop(0)
            flying[worker] = job, workers.now() - origin
            workers.submit(worker, job)
        if not flying:
            raise RuntimeError(f"{type(scheduler).__name__} waits for reports, and no job is running")
        worker, losses = workers.wait()
        job, begin = flying.pop(worker)
        idle.append(worker)
        ended.append(Ended(job, worker, begin, workers.now() - origin, losses))
        scheduler.report(job, losses)
    return Trace(ended, workers.count, ended[-1].end)
