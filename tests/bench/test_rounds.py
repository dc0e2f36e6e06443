"""Interleaved rounds: cold calls apart, warm calibration, fair shares, pairs from common rounds."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.clocks import clock
from bench.rounds import MAX_ROUNDS, MIN_ROUNDS, Timed, call_cold, pairs, plan_strides, run_rounds, warm_up


@pytest.mark.alone
def test_the_cold_call_never_decides_the_rounds_nor_enters_them():
    calls = []

    def step():
        calls.append(1)
        time.sleep(0.2 if len(calls) == 1 else 0.001)

    timed = Timed(step)
    call_cold(timed)
    warm_up(timed, 0.1)
    run_rounds({"step": timed}, 0.2)
    assert timed.cold_seconds > 0.2
    assert max(timed.seconds) < 0.1
    assert len(timed.seconds) > 5  # what pytest-benchmark's rule would have given; mostly over 100


def test_short_work_is_sampled_in_batches():
    timed = Timed(lambda: None)
    call_cold(timed)
    warm_up(timed, 0.1)
    assert timed.iterations > 100
    run_rounds({"nothing": timed}, 0.05)
    assert max(timed.seconds) < 1e-4  # seconds are per call, not per batch


def test_a_step_that_may_run_once_runs_once():
    calls = []
    timed = Timed(lambda: calls.append(1), max_rounds=1)
    call_cold(timed)
    warm_up(timed, 1.0)
    run_rounds({"once": timed}, 0.1)
    assert len(calls) == 1
    assert timed.seconds == [timed.cold_seconds]


def test_pairs_come_from_common_rounds_only():
    base, new = (
        Timed(print, rounds=[0, 1, 2], seconds=[1.0, 2.0, 3.0]),
        Timed(print, rounds=[0, 2], seconds=[5.0, 6.0]),
    )
    assert pairs(base, new) == ([1.0, 3.0], [5.0, 6.0])


times = st.lists(st.floats(1e-6, 2.0), min_size=1, max_size=6)


@given(times, st.floats(0.1, 10), st.lists(st.sampled_from([0, 2, 5]), min_size=6, max_size=6))
def test_every_plan_gives_enough_rounds_within_limits_and_common_ones(samples, budget, limits):
    limits = limits[: len(samples)]
    total, strides = plan_strides(samples, budget, limits)
    rounds = [{index for index in range(total) if index % stride == 0} for stride in strides]
    assert total <= MAX_ROUNDS
    for mine, limit in zip(rounds, limits, strict=True):
        assert len(mine) >= min(MIN_ROUNDS, limit or MIN_ROUNDS)
    smallest = min(rounds, key=len)
    assert all(smallest <= mine for mine in rounds)


def test_a_clock_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="there is host, jax, cuda"):
        clock("sundial")
