"""The tuning lab on real workers: states travel, Ray Tune trains the same, and nothing stays behind."""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from kept import Kept
from left_running import left_running
from tuning_searches import measured

from labs import load
from labs.concurrency import cluster
from labs.lab import configure
from labs.tuning.schedulers import AsynchronousHalving, RandomSearch
from labs.tuning.space import draw
from labs.tuning.training import Training, longest_s, one_thread

LAB = load("tuning")
SIZES = {"configurations": 9, "most_steps": 9, "least_steps": 1, "population": 4, "length": 8, "sequences": 4}
TINY = configure(LAB, "quick", SIZES | {"peer_trials": 2})
ROOT = Path(__file__).parents[2]
SEEDS = range(5)
NO_RAY = pytest.mark.skipif(bool(cluster.unavailable()), reason="Ray is not installed")


@pytest.fixture(scope="module")
def ray_is_there(two_ray_workers):
    """Warm workers for the tests of this file."""
    from labs.tuning import workers as warm

    owner = object()
    workers = warm.borrow(2, TINY.task(), draw(1, 0)[0], Kept(), owner)
    assert workers.cluster is two_ray_workers
    yield workers
    warm.give_back(owner)


@pytest.mark.ray
@NO_RAY
def test_searches_on_warm_workers_are_trainings_without_a_stop(ray_is_there):
    """Promoted and copied trials move between two processes; the losses are those of one."""
    addresses = [f"search/{name}" for name in ("successive_halving", "asha", "population")]
    outputs, notes = measured(TINY, addresses)
    assert all(check.passed for check in LAB.check(TINY, outputs)), LAB.check(TINY, outputs)
    predicted = {each.variant: each.value for each in LAB.predict(TINY, constants()) if each.exact}
    assert set(addresses) - set(predicted) == {"search/asha"}, "whose steps depend on losses"
    for address in addresses:
        values = notes[address].values
        assert set(values["job_worker"]) == {0, 1}
        jobs = zip(values["job_start"], values["job_stop"], strict=True)
        assert values["steps"] == [predicted.get(address, sum(stop - start for start, stop in jobs))]
        assert 0 < values["utilisation_ratio"][0] <= 1
        assert len(values["loss_nats"]) == len(values["loss_step"])


def constants():
    from stated import machine

    stated = machine()
    more = {"process_switch_s": 2e-5, "spawn_s": 0.1, "jax_call_s": 4e-6, "packed_exp_s": 1e-10}
    return replace(stated, constants={**stated.constants, **more})


@pytest.mark.ray
@NO_RAY
def test_a_loss_that_is_no_number_is_never_the_best(ray_is_there):
    """A learning rate beyond all reason: its trial ends, is ranked last, and is not promoted."""
    from labs.tuning.workers import WarmWorkers

    points = draw(3, 0)
    broken = replace(points[0], learning_rate=1e30)
    assert math.isnan(Training(TINY.task(), broken).advance(9)[9])
    scheduler = AsynchronousHalving([broken, *points[1:]], 3, 9, 3)
    ray_is_there.search(scheduler)
    assert scheduler.best()[0] in (1, 2)
    assert math.isnan(scheduler.losses[0][3])
    assert 9 not in scheduler.losses[0]
    alone = RandomSearch([broken], 9)
    ray_is_there.search(alone)
    assert alone.best() is None
    with pytest.raises(ValueError, match="count=0 workers"):
        WarmWorkers(0, TINY.task(), points[0], Kept())


@pytest.mark.ray
@NO_RAY
def test_ray_tune_trains_the_same_trials_and_torch_as_many_at_once(ray_is_there):
    """The short form: two trials of nine steps, in processes that are used again; three on two workers."""
    config = replace(TINY, together=3)
    outputs, _ = measured(config, ["start/ray_tune_reused", "start/warm_workers", "together/torch_at_once"])
    assert all(check.passed for check in LAB.check(config, outputs)), LAB.check(config, outputs)
    assert len(outputs["together/torch_at_once"]) == 3


@pytest.mark.proof
@pytest.mark.ray
@NO_RAY
def test_ray_tunes_halving_stops_trials_at_our_rungs_and_its_best_is_a_training_without_a_stop(ray_is_there):
    outputs, notes = measured(TINY, ["search/ray_tune_asha"])
    (check,) = LAB.check(TINY, outputs)
    assert check.passed, check
    values = notes["search/ray_tune_asha"].values
    (job,), (loss,) = outputs["search/ray_tune_asha"].jobs, outputs["search/ray_tune_asha"].losses
    assert (job.start, job.stop) == (0, 9)
    assert values["best_nats"] == [loss]
    assert 9 * 1 + 9 <= values["steps"][0] < 9 * 9, "some were stopped, and one was not"


@pytest.mark.ray
@NO_RAY
def test_ray_tune_that_does_not_end_is_a_time_out(ray_is_there):
    from labs.tuning import peer

    with pytest.raises(TimeoutError, match=r"0 of 1 trials had ended after 1\.0 s"):
        peer.tuned(TINY.task(), draw(1, 0), 1_000_000, 2, reuse=True, patience_s=1.0)


class Stuck(RandomSearch):
    """Its first job is one of many steps more than the search waits for."""

    def _next(self):
        job = super()._next()
        return job and replace(job, stop=job.stop + 10**9)


@pytest.mark.ray
@NO_RAY
def test_a_job_that_does_not_end_is_named_and_takes_no_time_from_the_next_search(ray_is_there, monkeypatch):
    points = draw(2, 0)
    before = ray_is_there.actors
    monkeypatch.setattr(ray_is_there, "patience_s", lambda: 1.0)
    with pytest.raises(TimeoutError, match=r"waited 1 s for worker 0: Job\(trial=0"):
        ray_is_there.search(Stuck(points, 9))
    monkeypatch.undo()
    assert not set(before) & set(ray_is_there.actors), "those that train on have been ended"
    state = RandomSearch(points, 9)
    ray_is_there.search(state)
    with one_thread():
        expected = [Training(TINY.task(), point).advance(9)[9] for point in points]
    assert [state.losses[trial][9] for trial in range(2)] == pytest.approx(expected, abs=1e-4)


@pytest.mark.ray
@NO_RAY
def test_a_long_job_is_waited_for_as_long_as_its_steps_take(ray_is_there, monkeypatch):
    from labs.concurrency.pools import PATIENCE_S
    from labs.tuning.schedulers.job import Job

    (point,) = draw(1, 0)
    assert 0 < ray_is_there.longest_step_s < PATIENCE_S
    monkeypatch.setattr(ray_is_there, "longest_step_s", 0.01)
    jobs = [Job(0, point, 0, 9), Job(1, point, 100_000, 107_200)]
    monkeypatch.setattr(ray_is_there, "flying", {job.trial: (0, job, None) for job in jobs})
    assert ray_is_there.patience_s() == pytest.approx(60 + 72)


def test_a_training_is_given_up_after_ten_times_what_its_first_steps_promise_once_all_is_warm():
    seconds = iter([0.0, 50.0, 60.0, 60.5])
    assert longest_s(TINY.task(), draw(1, 0)[0], 100, lambda: next(seconds)) == pytest.approx(
        10 * 0.5 / 2 * 100
    )


@pytest.mark.ray
@NO_RAY
def test_workers_of_another_number_or_task_are_not_lent(ray_is_there):
    from labs.tuning import workers as warm

    (point,) = draw(1, 0)
    with pytest.raises(
        ValueError, match=r"1 workers for Task\(width=32.* are asked for, and there are 2 for"
    ):
        warm.borrow(1, TINY.task(), point, Kept(), object())
    with pytest.raises(ValueError, match="give those back first"):
        warm.borrow(2, replace(TINY.task(), length=16), point, Kept(), object())


def test_a_cluster_of_another_number_of_workers_is_another_cluster(monkeypatch):
    """Not Ray's own, which takes seconds: who is started and ended."""
    events = []

    class Started:
        def __init__(self, workers, recorder):
            self.workers = workers
            events.append(f"start {workers}")

        def run(self, function, arguments):
            assert len(list(arguments)) == self.workers

        def close(self):
            events.append(f"end {self.workers}")

    monkeypatch.setattr(cluster, "_cluster", [])
    monkeypatch.setattr(cluster, "Cluster", Started)
    first = cluster.cluster(2, Kept())
    assert cluster.cluster(2, Kept()) is first
    assert cluster.cluster(3, Kept()).workers == 3
    cluster.shut_down()
    assert events == ["start 2", "end 2", "start 3", "end 3"]


# --- proofs ----------------------------------------------------------------------------------------


@pytest.mark.proof
@pytest.mark.ray
@pytest.mark.timeout(400)
@NO_RAY
def test_ctrl_c_in_the_middle_of_a_search_leaves_no_process_behind(tmp_path, measured):
    """As a shell does it: SIGINT to the command and all that it started."""
    command = [sys.executable, "-c", INTERRUPTED, "run", "tuning", "--quick"]
    command += ["--output", str(tmp_path / "results.json")]
    run = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True
    )
    try:
        end = time.monotonic() + 120
        while not any("Worker.run" in name for name in names_below(run.pid)):
            assert time.monotonic() < end, "no search has begun"
            assert run.poll() is None, run.communicate()[0]
            time.sleep(0.2)
        below = [each.pid for each in psutil.Process(run.pid).children(recursive=True)]
        assert len(below) > 4, "Ray is running"
        os.killpg(run.pid, signal.SIGINT)
        run.communicate(timeout=60)
        assert left_running(below) == []
    finally:
        run.kill()


INTERRUPTED = """
import sys, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background starts with it ignored
sys.argv = ["perflab", *sys.argv[1:]]
from bench.cli import main
main()
"""


def names_below(pid):
    try:
        return [" ".join(each.cmdline()) for each in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []
