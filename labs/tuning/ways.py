"""What is run, in groups.

``search``     each method on warm workers, to its end; Ray Tune's asynchronous halving
``start``      the same few whole trainings: Ray Tune with a process a trial, with processes used again, and
               warm workers
``together``   trials that are made already, for a few steps: one after another in torch and in JAX, in torch
               as many at once as there are workers, and all in one step of JAX
``fidelity``   all configurations on something cheaper than the whole training

A search, a fidelity and Ray Tune run once (``max_rounds=1``): all together take half a minute. What is cold
is taken out before: the workers have trained, and the driver has imported Ray Tune.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from labs.concurrency import cluster
from labs.concurrency.pools import PATIENCE_S, Step
from labs.lab import Recorder, Variant
from labs.lab import Step as Timed
from labs.tuning import peer
from labs.tuning.config import METHODS, Config
from labs.tuning.running import Trace
from labs.tuning.schedulers import RandomSearch, Scheduler
from labs.tuning.schedulers.job import Job
from labs.tuning.training import Task, longest_s

SEARCH, START, TOGETHER, FIDELITY = "search", "start", "together", "fidelity"
PEER = "ray_tune_asha"
FIDELITIES = ("shorter_sequences", "smaller_batch", "narrower")
TOGETHER_STEPS = 12


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
            state = scheduler(config)
            trace = workers.search(state, task(config))
            record(trace, recorder)
            for name, count in state.counted.items():
                recorder.record(name, count, "")
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


def _patience_s(config: Config, trials: int, recorder: Recorder) -> float:
    """How long Ray Tune may take for so many whole trainings: their starts, and their steps."""
    task, rounds = config.task(), -(-trials // config.workers)
    steps_s = longest_s(task, config.points(1)[0], config.most_steps, recorder.now)
    return PATIENCE_S * (1 + rounds) + rounds * steps_s


def _peers_search(config: Config, recorder: Recorder) -> Timed:
    """Ray Tune's own asynchronous halving of the same points over the same rungs."""
    cluster.cluster(config.workers, recorder)
    peer.load()
    task, points, rungs = config.task(), config.points(), config.rungs()
    patience_s = _patience_s(config, len(points), recorder)

    def run() -> Trained:
        found = peer.searched(task, points, rungs, config.eta, config.workers, patience_s)
        recorder.record("steps", sum(steps for steps, _ in found), "")
        ended = {
            trial: loss
            for trial, (steps, loss) in enumerate(found)
            if steps == config.most_steps and math.isfinite(loss)
        }
        if not ended:
            raise RuntimeError(
                f"Ray Tune: no trial of {len(points)} came to an end with a loss that is a number"
            )
        best = min(ended, key=ended.__getitem__)
        recorder.record("best", ended[best], "nats")
        return Trained([Job(best, points[best], 0, config.most_steps)], [ended[best]])

    return run


def _tune(reuse: bool) -> Callable[[Config, Recorder], Timed]:
    def setup(config: Config, recorder: Recorder) -> Timed:
        cluster.cluster(config.workers, recorder)
        peer.load()
        task, points = config.task(), config.points(config.peer_trials)
        patience_s = _patience_s(config, len(points), recorder)
        return lambda: peer.tuned(task, points, config.most_steps, config.workers, reuse, patience_s)

    return setup


def _warm(config: Config, recorder: Recorder) -> Timed:
    from labs.tuning import workers as warm

    owner, points = object(), config.points(config.peer_trials)
    workers = warm.borrow(config.workers, config.task(), points[0], recorder, owner)

    def run() -> list[float]:
        state = RandomSearch(points, config.most_steps)
        workers.search(state)
        return [state.losses[trial][config.most_steps] for trial in range(len(points))]

    return Step(run, lambda: warm.give_back(owner))


def _torch_in_turn(config: Config, recorder: Recorder) -> Timed:
    from labs.tuning.training import InTurn, one_thread

    def run() -> list[float]:
        with one_thread():
            return trials.losses(TOGETHER_STEPS)

    trials = InTurn(replace(config.task(), milestones=()), config.points(config.together))
    return run


def _torch_at_once(config: Config, recorder: Recorder) -> Timed:
    """As many at once as there are workers, which have made them before."""
    from labs.tuning import workers as warm

    owner, points = object(), config.points(config.together)
    workers = warm.borrow(config.workers, config.task(), points[0], recorder, owner)
    workers.hold(replace(config.task(), milestones=()), points)
    return Step(lambda: workers.advance_held(TOGETHER_STEPS), lambda: warm.give_back(owner))


def _jax(at_once: int) -> Callable[[Config, Recorder], Timed]:
    """``at_once`` trials in a step (0: all)."""

    def setup(config: Config, recorder: Recorder) -> Timed:
        from labs.tuning.together import Together
        from labs.tuning.training import validation

        task, points = config.task(), config.points(config.together)
        size = at_once or len(points)
        parts = [Together(task, points[begin : begin + size]) for begin in range(0, len(points), size)]

        def run() -> list[float]:
            found: list[float] = []
            for trials in parts:
                trials.rewind()
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
        Variant(SEARCH, PEER, _peers_search, max_rounds=1, unavailable=no_peer),
        Variant(START, "ray_tune", _tune(reuse=False), max_rounds=1, unavailable=no_peer),
        Variant(START, "ray_tune_reused", _tune(reuse=True), max_rounds=1, unavailable=no_peer),
        Variant(START, "warm_workers", _warm, max_rounds=3, unavailable=missing),
        Variant(TOGETHER, "torch_in_turn", _torch_in_turn),
        Variant(TOGETHER, "torch_at_once", _torch_at_once, threads=0, unavailable=missing),
        Variant(TOGETHER, "jax_in_turn", _jax(1), threads=0, clock="jax"),
        Variant(TOGETHER, "jax_vmap", _jax(0), threads=0, clock="jax"),
    ]
    found += [
        Variant(FIDELITY, name, _cheaper(name), max_rounds=1, unavailable=missing) for name in FIDELITIES
    ]
    return found
