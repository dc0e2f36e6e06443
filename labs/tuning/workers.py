"""Warm workers: Ray actors that have imported torch and read the text, and keep both from trial to trial.

What a trial needs to go on stays in Ray's object store, where any worker finds it: a promoted trial waits for
no particular one.
"""

from __future__ import annotations

from typing import Any

from labs.concurrency import cluster
from labs.concurrency.pools import PATIENCE_S
from labs.lab import Recorder
from labs.tuning.schedulers.job import Job, Losses
from labs.tuning.training import State, Task, Training, validation

KEPT = 2
"""States of a trial: population based training copies the last one while its owner goes on."""


class Worker:
    """Lives in a process of its own; one thread computes."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)

    def warm(self, task: Task, point: Any) -> float:
        """Everything that a first trial would find cold; a loss."""
        validation(task)
        training = Training(task, point)
        training.advance(2)
        return training.loss()

    def run(self, task: Task, job: Job, state: State | None) -> tuple[dict[int, float], State]:
        training = Training(task, job.point, state)
        if training.steps != job.start:
            raise ValueError(f"{job} goes on from a state after {training.steps} steps")
        losses = training.advance(job.stop)
        return losses, training.state()


class WarmWorkers:
    """``labs.tuning.running.Workers`` on Ray actors. start_s: seconds until all were warm, the cluster's own
    start not among them. ValueError: no workers."""

    def __init__(self, count: int, task: Task, point: Any, recorder: Recorder) -> None:
        if count < 1:
            raise ValueError(f"count={count} workers: a search needs at least 1")
        self.cluster = cluster.cluster(count, recorder)
        import ray

        self.count, self.task, self.now = count, task, recorder.now
        begin = self.now()
        actor = ray.remote(num_cpus=0)(Worker)  # as many as there are: nothing is left to be scheduled
        self.actors = [actor.remote() for _ in range(count)]
        self._get([each.warm.remote(task, point) for each in self.actors], "workers that start")
        self.start_s = self.now() - begin
        self.forget()

    def _get(self, references: Any, what: str) -> Any:
        import ray

        try:
            return ray.get(references, timeout=PATIENCE_S)
        except ray.exceptions.GetTimeoutError:
            raise TimeoutError(f"waited {PATIENCE_S:g} s for {what}") from None

    def forget(self, task: Task | None = None) -> None:
        """Before another search, of another task if one is given: no state is kept."""
        self.task = task or self.task
        self.states: dict[tuple[int, int], Any] = {}
        self.flying: dict[Any, tuple[int, Job, Any]] = {}

    def submit(self, worker: int, job: Job) -> None:
        state = None if job.source is None else self.states[job.source, job.start]
        run = self.actors[worker].run.options(num_returns=2)
        losses, reached = run.remote(self.task, job, state)
        self.flying[losses] = worker, job, reached

    def wait(self) -> tuple[int, Losses]:
        import ray

        ready, _ = ray.wait(list(self.flying), num_returns=1, timeout=PATIENCE_S)
        if not ready:
            jobs = "; ".join(f"worker {worker}: {job}" for worker, job, _ in self.flying.values())
            raise TimeoutError(f"waited {PATIENCE_S:g} s for {jobs}")
        worker, job, reached = self.flying.pop(ready[0])
        losses = ray.get(ready[0])
        self.states[job.trial, job.stop] = reached
        steps = sorted(step for trial, step in self.states if trial == job.trial)
        for step in steps[:-KEPT]:
            del self.states[job.trial, step]
        return worker, losses

    def close(self) -> None:
        import ray

        self.forget()
        for actor in self.actors:
            ray.kill(actor)


_kept: list[tuple[WarmWorkers, list[object]]] = []


def borrow(count: int, task: Task, point: Any, recorder: Recorder, owner: object) -> WarmWorkers:
    """The process's workers, started at the first call, until every owner has given them back."""
    if not _kept:
        _kept.append((WarmWorkers(count, task, point, recorder), []))
    workers, owners = _kept[0]
    owners.append(owner)
    return workers


def give_back(owner: object) -> None:
    """Ends the workers when nobody else has them."""
    if _kept:
        workers, owners = _kept[0]
        if owner in owners:
            owners.remove(owner)
        if not owners:
            _kept.clear()
            workers.close()
