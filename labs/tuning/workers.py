"""Warm workers: Ray actors that have imported torch and read the text, and keep both from trial to trial.

What a trial needs to go on stays in Ray's object store, where any worker finds it: a promoted trial waits for
no particular one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from labs.concurrency import cluster
from labs.concurrency.pools import PATIENCE_S
from labs.lab import Recorder
from labs.tuning.running import Trace, search
from labs.tuning.schedulers import Scheduler
from labs.tuning.schedulers.job import Job, Losses
from labs.tuning.space import Point
from labs.tuning.training import InTurn, State, Task, Training, longest_s, validation

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

    def hold(self, task: Task, points: Sequence[Point]) -> None:
        """Make these trials, for ``advance_held``."""
        self.held = InTurn(task, points)

    def advance_held(self, steps: int) -> list[float]:
        return self.held.losses(steps)


class WarmWorkers:
    """``labs.tuning.running.Workers`` on Ray actors. start_s: seconds until all were warm, the cluster's own
    start not among them. ValueError: no workers."""

    def __init__(self, count: int, task: Task, point: Any, recorder: Recorder) -> None:
        if count < 1:
            raise ValueError(f"count={count} workers: a search needs at least 1")
        self.cluster = cluster.cluster(count, recorder)
        self.count, self.task, self.point, self.now = count, task, point, recorder.now
        begin = self.now()
        self._start()
        self.start_s = self.now() - begin
        self.longest_step_s = longest_s(task, point, 1, self.now)

    def _start(self) -> None:
        import ray

        actor = ray.remote(num_cpus=0)(Worker)  # as many as there are: nothing is left to be scheduled
        self.actors = [actor.remote() for _ in range(self.count)]
        self._get([each.warm.remote(self.task, self.point) for each in self.actors], "workers that start")
        self._forget()

    def _get(self, references: Any, what: str, longest_s: float = 0.0) -> Any:
        """longest_s: that the work takes at most, beside what any call may wait."""
        import ray

        patience = PATIENCE_S + longest_s
        try:
            return ray.get(references, timeout=patience)
        except ray.exceptions.GetTimeoutError:
            raise TimeoutError(f"waited {patience:.0f} s for {what}") from None

    def _forget(self) -> None:
        """No state is kept, and no job runs."""
        self.current = self.task
        self.states: dict[tuple[int, int], Any] = {}
        self.flying: dict[Any, tuple[int, Job, Any]] = {}

    def search(self, scheduler: Scheduler, task: Task | None = None) -> Trace:
        """Run it to the end, on another task if one is given (at most as costly as the workers' own).

        Where that fails the workers are started anew before the error goes on: a job that still runs must not
        take time from whoever comes next.
        """
        self._forget()
        self.current = task or self.task
        try:
            return search(scheduler, self)
        except Exception:
            self._kill()
            self._start()
            raise

    def patience_s(self) -> float:
        """How long the next job may take to end: as the longest of those that run, and more."""
        return PATIENCE_S + self.longest_step_s * max(job.steps for _, job, _ in self.flying.values())

    def submit(self, worker: int, job: Job) -> None:
        state = None if job.source is None else self.states[job.source, job.start]
        run = self.actors[worker].run.options(num_returns=2)
        losses, reached = run.remote(self.current, job, state)
        self.flying[losses] = worker, job, reached

    def wait(self) -> tuple[int, Losses]:
        import ray

        patience = self.patience_s()
        ready, _ = ray.wait(list(self.flying), num_returns=1, timeout=patience)
        if not ready:
            jobs = "; ".join(f"worker {worker}: {job}" for worker, job, _ in self.flying.values())
            raise TimeoutError(f"waited {patience:.0f} s for {jobs}")
        worker, job, reached = self.flying.pop(ready[0])
        losses = ray.get(ready[0])
        self.states[job.trial, job.stop] = reached
        steps = sorted(step for trial, step in self.states if trial == job.trial)
        for step in steps[:-KEPT]:
            del self.states[job.trial, step]
        return worker, losses

    def hold(self, task: Task, points: Sequence[Point]) -> None:
        """Make these trials, shared among the workers, for ``advance_held``."""
        shares = [points[place :: self.count] for place in range(self.count)]
        self.most_held = len(shares[0])
        self.holding = [actor for actor, share in zip(self.actors, shares, strict=True) if share]
        made = [
            actor.hold.remote(task, share)
            for actor, share in zip(self.holding, filter(None, shares), strict=True)
        ]
        self._get(made, "workers that make trials")

    def advance_held(self, steps: int) -> list[float]:
        """The losses of the trials after ``steps`` steps from their beginning, all workers at once."""
        running = [actor.advance_held.remote(steps) for actor in self.holding]
        found = self._get(running, "trials that are held", self.longest_step_s * steps * self.most_held)
        count = sum(map(len, found))
        return [found[place % self.count][place // self.count] for place in range(count)]

    def _kill(self) -> None:
        import ray

        self._forget()
        for actor in self.actors:
            ray.kill(actor)

    close = _kill


_kept: list[tuple[WarmWorkers, list[object]]] = []


def borrow(count: int, task: Task, point: Any, recorder: Recorder, owner: object) -> WarmWorkers:
    """The process's workers, started at the first call, until every owner has given them back.

    ValueError: there are workers already, and they are not as many or have another task.
    """
    if not _kept:
        _kept.append((WarmWorkers(count, task, point, recorder), []))
    workers, owners = _kept[0]
    if (workers.count, workers.task) != (count, task):
        raise ValueError(
            f"{count} workers for {task} are asked for, and there are {workers.count} for {workers.task}: "
            "give those back first"
        )
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
