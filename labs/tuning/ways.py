"""What is run, in groups.

``search``     each method on warm workers, to its end
``start``      the same few whole trainings: Ray Tune with a process a trial, with processes used again, and
               warm workers
``together``   trials one after another in torch and in JAX, and all in one step of JAX
``fidelity``   all configurations on something cheaper than the whole training
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from labs.concurrency import cluster
from labs.concurrency.pools import Step
from labs.lab import Recorder, Variant
from labs.lab import Step as Timed
from labs.tuning import peer
from labs.tuning.config import METHODS, Config
from labs.tuning.running import Trace, search
from labs.tuning.schedulers import RandomSearch, Scheduler
from labs.tuning.schedulers.job import Job
from labs.tuning.training import Task

SEARCH, START, TOGETHER, FIDELITY = "search", "start", "together", "fidelity"
FIDELITIES = ("shorter_sequences", "smaller_batch", "narrower")
TOGETHER_STEPS = 6


@dataclass(frozen=True)
class Trained:
    """What a search returns: how its best trial was trained, job by job, and the loss after each."""

    jobs: Sequence[Job]
    losses: Sequence[float]


def lineage(trace: Trace, trial: int, steps: int) -> Trained:
    """The jobs that led to the trial's state after ``steps`` steps, its sources' among them."""
    by_end = {(each.job.trial, each.job.stop): each for each in trace.ended}
    jobs, losses = [], []
    while steps:
        each = by_end[trial, steps]
        jobs.append(each.job)
        losses.append(each.losses[steps])
        trial, steps = each.job.source if each.job.source is not None else trial, each.job.start
    return Trained(jobs[::-1], losses[::-1])


def record(trace: Trace, recorder: Recorder) -> None:
    """Every job and every loss that is a number."""
    recorder.record("steps", trace.steps, "")
    recorder.record("jobs", len(trace.ended), "")
    recorder.record("utilisation", trace.utilisation, "ratio")
    for each in trace.ended:
        for name, value in (
            ("job_trial", each.job.trial),
            ("job_start", each.job.start),
            ("job_stop", each.job.stop),
            ("job_worker", each.worker),
        ):
            recorder.record(name, value, "")
        recorder.record("job_begin", each.begin, "s")
        recorder.record("job_end", each.end, "s")
        for step, loss in each.losses.items():
            if abs(loss) < float("inf"):  # neither infinite nor NaN
                recorder.record("loss_trial", each.job.trial, "")
                recorder.record("loss_step", step, "")
                recorder.record("loss", loss, "nats")
                recorder.record("loss_at", each.end, "s")


def _on_workers(
    scheduler: Callable[[Config], Scheduler], task: Callable[[Config], Task]
) -> Callable[[Config, Recorder], Timed]:
    """A search on the warm workers, from the first job to the last."""

    def setup(config: Config, recorder: Recorder) -> Timed:
        from labs.tuning import workers as warm

        owner = object()
        workers = warm.borrow(config.workers, config.task(), config.points()[0], recorder, owner)
        recorder.record("cluster_start", workers.cluster.start_s, "s")
        recorder.record("workers_start", workers.start_s, "s")

        def run() -> Trained:
            workers.forget(task(config))
            state = scheduler(config)
            trace = search(state, workers)
            record(trace, recorder)
            best = state.best()
            if best is None:
                raise RuntimeError(
                    f"no trial of {len(state.points)} came to an end with a loss that is a number"
                )
            return lineage(trace, best[0], state.most)

        return Step(run, lambda: warm.give_back(owner))

    return setup


def _method(name: str) -> Callable[[Config, Recorder], Timed]:
    return _on_workers(lambda config: config.scheduler(name), Config.task)


def cheaper(config: Config, name: str) -> Task:
    """The task at a cheaper fidelity."""
    task = config.task()
    if name == "narrower":
        return replace(task, width=task.width // 2)
    if name == "shorter_sequences":
        return replace(task, length=task.length // 4)
    return replace(task, sequences=task.sequences // 4)


def _cheaper(name: str) -> Callable[[Config, Recorder], Timed]:
    return _on_workers(
        lambda config: RandomSearch(config.points(), config.most_steps), lambda config: cheaper(config, name)
    )


def peer_points(config: Config) -> Sequence[Any]:
    from labs.tuning.space import draw

    return draw(config.peer_trials, config.seed)


def _tune(reuse: bool) -> Callable[[Config, Recorder], Timed]:
    def setup(config: Config, recorder: Recorder) -> Timed:
        cluster.cluster(config.workers, recorder)
        task, points = config.task(), peer_points(config)
        return lambda: peer.tuned(task, points, config.most_steps, config.workers, reuse)

    return setup


def _warm(config: Config, recorder: Recorder) -> Timed:
    from labs.tuning import workers as warm

    owner, points = object(), peer_points(config)
    workers = warm.borrow(config.workers, config.task(), points[0], recorder, owner)

    def run() -> list[float]:
        workers.forget(config.task())
        state = RandomSearch(points, config.most_steps)
        search(state, workers)
        return [state.losses[trial][config.most_steps] for trial in range(len(points))]

    return Step(run, lambda: warm.give_back(owner))


def together_points(config: Config) -> Sequence[Any]:
    from labs.tuning.space import draw

    return draw(config.together, config.seed)


def _torch_in_turn(config: Config, recorder: Recorder) -> Timed:
    import torch

    from labs.tuning.training import Training

    def run() -> list[float]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # which is faster, on tensors as small as these
        try:
            found = []
            for training in [Training(task, point) for point in points]:
                training.advance(TOGETHER_STEPS)
                found.append(training.loss())
            return found
        finally:
            torch.set_num_threads(threads)

    task, points = replace(config.task(), milestones=()), together_points(config)
    return run


def _jax(at_once: int) -> Callable[[Config, Recorder], Timed]:
    """``at_once`` trials in a step (0: all)."""

    def setup(config: Config, recorder: Recorder) -> Timed:
        from labs.tuning.together import Together
        from labs.tuning.training import validation

        task, points = config.task(), together_points(config)
        size = at_once or len(points)
        parts = [points[begin : begin + size] for begin in range(0, len(points), size)]

        def run() -> list[float]:
            found: list[float] = []
            for part in parts:
                trials = Together(task, part)
                for _ in range(TOGETHER_STEPS):
                    trials.step()
                found += trials.losses(*validation(task)).tolist()
            return found

        return run

    return setup


def variants(config: Config) -> Sequence[Variant]:
    """All of them; without Ray the groups that need none."""
    missing = cluster.unavailable()
    found = [Variant(SEARCH, name, _method(name), max_rounds=1, unavailable=missing) for name in METHODS]
    no_peer = missing or peer.unavailable()
    found += [
        Variant(START, "ray_tune", _tune(reuse=False), max_rounds=1, unavailable=no_peer),
        Variant(START, "ray_tune_reused", _tune(reuse=True), max_rounds=1, unavailable=no_peer),
        Variant(START, "warm_workers", _warm, max_rounds=1, unavailable=missing),
        Variant(TOGETHER, "torch_in_turn", _torch_in_turn),
        Variant(TOGETHER, "jax_in_turn", _jax(1), threads=0, clock="jax"),
        Variant(TOGETHER, "jax_vmap", _jax(0), threads=0, clock="jax"),
    ]
    found += [
        Variant(FIDELITY, name, _cheaper(name), max_rounds=1, unavailable=missing) for name in FIDELITIES
    ]
    return found
