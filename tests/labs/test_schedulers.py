"""Searches as state machines: who goes on, what it costs, and that no order of reports breaks them."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labs.tuning.extrapolation import extrapolated
from labs.tuning.running import search
from labs.tuning.schedulers import (
    AsynchronousHalving,
    Extrapolating,
    Hyperband,
    PopulationBased,
    RandomSearch,
    SuccessiveHalving,
    by_extrapolation,
    hyperband,
    rungs,
)
from labs.tuning.simulated import Late, SimulatedWorkers
from labs.tuning.space import BOUNDS, Point, draw, mutated

KINDS = {
    "random": lambda points, least, most, eta: RandomSearch(points, most),
    "successive_halving": SuccessiveHalving,
    "hyperband": Hyperband,
    "asha": AsynchronousHalving,
    "asha_extrapolated": lambda points, least, most, eta: AsynchronousHalving(
        points, least, most, eta, by_extrapolation(most)
    ),
    "extrapolating": lambda points, least, most, eta: Extrapolating(
        points, [step for step in (least, 2 * least) if step < most], most, 0.1
    ),
    "population": lambda points, least, most, eta: PopulationBased(points, least, most, 0),
}


def sizes():
    return st.tuples(st.integers(2, 30), st.integers(1, 6), st.integers(1, 40), st.integers(2, 5))


def run_at_random(scheduler, workers, losses, seed):
    """Reports in any order: (jobs in the order they were asked for, most that ran at once)."""
    generator = random.Random(seed)
    jobs, flying, most = [], [], 0
    while not scheduler.finished:
        while len(flying) < workers and (job := scheduler.next_job()) is not None:
            jobs.append(job)
            flying.append(job)
        assert flying, f"{scheduler} waits for nobody"
        most = max(most, len(flying))
        job = flying.pop(generator.randrange(len(flying)))
        scheduler.report(job, {step: losses(job, step) for step in range(job.start + 1, job.stop + 1)})
    assert scheduler.next_job() is None
    return jobs, most


@given(st.sampled_from(sorted(KINDS)), sizes(), st.integers(1, 9), st.integers(0, 99), st.booleans())
def test_every_search_ends_and_runs_each_step_of_a_trial_once(kind, size, workers, seed, broken):
    """Whatever the sizes, the workers, the order of reports and the losses, some of which are no numbers."""
    count, least, more, eta = size
    most = least + more
    scheduler = KINDS[kind](draw(count, 0), least, most, eta)

    def losses(job, step):
        drawn = random.Random(f"{job.trial} {step} {seed}").random()
        return math.nan if broken and drawn < 0.2 else drawn

    jobs, at_once = run_at_random(scheduler, workers, losses, seed)
    assert at_once <= workers
    reached = {}
    for job in jobs:
        assert 0 <= job.start < job.stop <= most
        assert job.start == reached.get(job.trial, 0), "a trial goes on where it was"
        assert (job.source is None) == (job.start == 0)
        reached[job.trial] = job.stop
    if not (broken and kind == "extrapolating"):  # which gives up what is no number
        assert most in reached.values(), "somebody came to the end"
    best = scheduler.best()
    ends = [curve[most] for curve in scheduler.losses.values() if most in curve]
    numbers = [loss for loss in ends if math.isfinite(loss)]
    assert (best is None) == (not numbers)
    assert best is None or best[1] == min(numbers)


@given(sizes(), st.integers(1, 9), st.integers(0, 99))
def test_halving_sends_on_the_best_of_each_rung(size, workers, seed):
    count, least, more, eta = size
    most = least + more
    values = random.Random(seed).sample(range(1000), count)
    scheduler = SuccessiveHalving(draw(count, 0), least, most, eta)
    jobs, _ = run_at_random(scheduler, workers, lambda job, step: values[job.trial], seed)
    order = sorted(range(count), key=values.__getitem__)
    left = count
    for stop in rungs(least, most, eta):
        assert {job.trial for job in jobs if job.stop == stop} == set(order[:left])
        left = max(1, left // eta)


@given(sizes(), st.integers(1, 9), st.integers(0, 99))
def test_asynchronous_halving_sends_on_whoever_a_full_rung_would_and_never_more_than_came(
    size, workers, seed
):
    count, least, more, eta = size
    most = least + more
    values = random.Random(seed).sample(range(1000), count)
    scheduler = AsynchronousHalving(draw(count, 0), least, most, eta)
    jobs, _ = run_at_random(scheduler, workers, lambda job, step: values[job.trial], seed)
    order = sorted(range(count), key=values.__getitem__)
    steps = rungs(least, most, eta)
    arrived = [{job.trial for job in jobs if job.stop == stop} for stop in steps]
    assert arrived[0] == set(range(count))
    if len(steps) > 1:
        assert set(order[: count // eta]) <= arrived[1]
    best = scheduler.best()
    assert best[0] == order[0], "losses that never cross lead to the best"


def test_asynchronous_halving_waits_for_nobody():
    """Nine workers, three trials of a rung in: the best goes on while six are still running."""
    scheduler = AsynchronousHalving(draw(9, 0), 1, 9, 3)
    jobs = [scheduler.next_job() for _ in range(9)]
    for job, loss in zip(jobs[:2], (3.0, 1.0), strict=True):
        scheduler.report(job, {1: loss})
        assert scheduler.next_job() is None
    scheduler.report(jobs[2], {1: 2.0})
    promoted = scheduler.next_job()
    assert (promoted.trial, promoted.start, promoted.stop, promoted.source) == (1, 1, 3, 1)
    waiting = SuccessiveHalving(draw(9, 0), 1, 9, 3)
    jobs = [waiting.next_job() for _ in range(9)]
    for job in jobs[:8]:
        waiting.report(job, {1: 1.0})
        assert waiting.next_job() is None


def test_hyperband_has_the_brackets_of_the_paper():
    """Li et al. 2018, table 1: R = 81, eta = 3."""
    assert hyperband.brackets(1, 81, 3) == [(81, 1), (34, 3), (15, 9), (8, 27), (5, 81)]
    whole = sum(count for count, _ in hyperband.brackets(1, 81, 3))
    assert hyperband.shares(whole, 1, 81, 3) == hyperband.brackets(1, 81, 3)
    for points in range(1, 60):
        found = hyperband.shares(points, 1, 81, 3)
        assert sum(count for count, _ in found) == points
        assert all(count > 0 for count, _ in found)


def test_the_worst_of_a_population_take_over_from_the_best():
    scheduler = PopulationBased(draw(8, 0), 2, 6, seed=1)
    first = [scheduler.next_job() for _ in range(8)]
    begun = list(scheduler.points)
    for job in first:
        assert scheduler.next_job() is None, "all meet"
        scheduler.report(job, {2: math.nan if job.trial == 3 else float(job.trial)})
    second = [scheduler.next_job() for _ in range(8)]
    sources = {job.trial: job.source for job in second}
    assert scheduler.copied == 2
    for trial in (3, 7):  # the one that is no number, and the worst that is
        assert sources[trial] in (0, 1)
        assert scheduler.points[trial] != begun[trial]
        old = begun[sources[trial]]
        for mine, other, (low, high) in zip(scheduler.points[trial].values, old.values, BOUNDS, strict=True):
            assert mine in (min(max(0.8 * other, low), high), min(max(1.25 * other, low), high))
    for trial in (0, 1, 2, 4, 5, 6):
        assert sources[trial] == trial
        assert scheduler.points[trial] == begun[trial]


def test_the_most_promising_curve_goes_on_and_the_others_are_given_up():
    scheduler = Extrapolating(draw(3, 0), [4], 16, margin=0.1)
    curves = [lambda t: 2 + 2 / t, lambda t: 3 + 1 / t, lambda t: 1.5 + 4 / t]  # the last leads last at 4

    def losses(job):
        return {step: curves[job.trial](step) for step in range(job.start + 1, job.stop + 1)}

    stops = []
    while not scheduler.finished:
        job = scheduler.next_job()
        stops.append((job.trial, job.stop))
        scheduler.report(job, losses(job))
    assert stops == [(0, 4), (1, 4), (2, 4), (2, 16)], "all begin, and the most promising goes on"
    assert scheduler.given_up == {0, 1}
    assert scheduler.best()[0] == 2


@given(st.floats(0.5, 4), st.floats(0.1, 5), st.sampled_from([0.3, 0.5, 1.0, 1.5]), st.integers(4, 20))
def test_a_power_law_is_drawn_on_to_its_end(end, scale, power, count):
    steps = list(range(1, count + 1))
    said = extrapolated(steps, [end + scale * step**-power for step in steps], 10 * count)
    assert said == pytest.approx(end + scale * (10 * count) ** -power, abs=0.06 * scale)


def test_what_does_not_fall_stays_where_it_is():
    assert extrapolated([1, 2, 3], [2.0, 2.5, 3.0], 9) == 3.0
    assert extrapolated([1, 2], [3.0, 2.0], 9) == 2.0
    assert math.isnan(extrapolated([1, 2, 3], [3.0, math.nan, 2.0], 9))


@given(st.integers(0, 99), st.integers(1, 50))
def test_points_lie_in_their_bounds_and_more_begin_with_the_fewer(seed, count):
    points = draw(count, seed)
    assert draw(count + 5, seed)[:count] == points
    generator = random.Random(seed)
    for point in points + [mutated(point, generator) for point in points]:
        assert all(low <= value <= high for value, (low, high) in zip(point.values, BOUNDS, strict=True))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: SuccessiveHalving(p, 1, 9, 1), "eta=1: of eta trials one goes on, so it is at least 2"),
        (lambda p: AsynchronousHalving(p, 9, 3, 3), "most=3 steps are fewer than least=9"),
        (lambda p: Hyperband(p, 0, 3, 3), "least=0 steps: the first rung is at least 1"),
        (lambda p: RandomSearch([], 3), "no points to search"),
        (lambda p: RandomSearch(p, 0), "most=0 steps"),
        (lambda p: SuccessiveHalving(p, 1, 9, 3, []), "no trials compete"),
        (lambda p: PopulationBased(p[:1], 1, 9, 0), "1 member: a population has at least 2"),
        (lambda p: PopulationBased(p, 10, 9, 0), "interval=10 steps: it is from 1 to the 9"),
        (lambda p: Extrapolating(p, [3, 3], 9, 0.1), "have to increase"),
        (lambda p: Extrapolating(p, [3], 9, -0.1), "margin=-0.1 nats is negative"),
        (lambda p: SimulatedWorkers(0, [], 1.0), "count=0 workers"),
        (lambda p: draw(0, 0), "count=0 points"),
        (lambda p: extrapolated([], [], 3), "0 steps and 0 losses"),
        (lambda p: extrapolated([2, 1], [1.0, 1.0], 3), "have to increase"),
    ],
)
def test_wrong_sizes_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make(draw(4, 0))


def test_a_report_that_nobody_asked_for_is_refused():
    scheduler = RandomSearch(draw(2, 0), 3)
    job = scheduler.next_job()
    with pytest.raises(ValueError, match="not after 3"):
        scheduler.report(job, {2: 1.0})
    scheduler.report(job, {3: 1.0})
    with pytest.raises(ValueError, match="reported twice"):
        scheduler.report(job, {3: 1.0})


# --- on a simulated clock --------------------------------------------------------------------------


def curves(count, most, seed=0):
    generator = random.Random(seed)
    return [
        {step: generator.random() * 0.1 + trial / step for step in range(1, most + 1)}
        for trial in range(count)
    ]


def test_a_simulated_search_takes_what_its_jobs_take():
    """Random search of 4 trials on 2 workers, 9 steps of 2 s and 1 s a job: two rounds of 19 s."""
    workers = SimulatedWorkers(2, curves(4, 9), step_s=2.0, job_s=1.0)
    trace = search(RandomSearch(draw(4, 0), 9), workers)
    assert trace.seconds == 38.0
    assert trace.utilisation == 1.0
    assert trace.steps == 36
    assert [each.worker for each in trace.ended] == [0, 1, 0, 1]


def test_a_simulation_is_the_same_each_time_and_later_with_stragglers():
    def run(late):
        workers = SimulatedWorkers(3, curves(9, 9), 1.0, late=late)
        return search(AsynchronousHalving(draw(9, 0), 1, 9, 3), workers)

    late = Late(0.3, 4.0, seed=2)
    assert run(late) == run(late)
    assert run(late).seconds > run(None).seconds
    everyone = search(
        RandomSearch(draw(9, 0), 9), SimulatedWorkers(3, curves(9, 9), 1.0, late=Late(1.0, 4.0))
    )
    assert everyone.seconds == 4 * 27


def test_a_scheduler_that_never_ends_is_named():
    class Stuck(RandomSearch):
        def _next(self):
            return None

    with pytest.raises(RuntimeError, match="Stuck waits for reports, and no job is running"):
        search(Stuck([Point(1, 1, 1, 1)], 3), SimulatedWorkers(1, curves(1, 3), 1.0))
