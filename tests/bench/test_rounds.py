"""Interleaved rounds: cold calls apart, warm calibration, fair shares, pairs from common rounds."""

import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.clocks import clock
from bench.rounds import (
    MAX_ROUNDS,
    MIN_ROUNDS,
    Timed,
    call_cold,
    pairs,
    plan_strides,
    run_rounds,
    takes_part,
    time_together,
    warm_up,
)


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
    plan = list(zip(strides, limits, strict=True))
    rounds = [{index for index in range(total) if takes_part(index, *each)} for each in plan]
    assert total <= MAX_ROUNDS
    for mine, limit in zip(rounds, limits, strict=True):
        assert len(mine) >= min(MIN_ROUNDS, limit or MIN_ROUNDS)
        assert len(mine) <= (limit or MAX_ROUNDS)
    unlimited = [mine for mine, limit in zip(rounds, limits, strict=True) if not limit]
    smallest = min(unlimited, key=len, default=set())
    assert all(smallest <= mine for mine in unlimited)
    assert all(len(mine & other) >= 2 for mine in rounds for other in rounds)


@pytest.mark.alone
def test_a_sample_does_not_pay_for_what_the_variant_before_left():
    calls = []

    def variant(name):
        def step():
            time.sleep(3e-4 if calls[-1:] == [name] else 3e-3)
            calls.append(name)

        return Timed(step, warm_seconds=3e-4)

    timed = {name: variant(name) for name in ("one", "other")}
    run_rounds(timed, 0.3)
    for item in timed.values():
        assert len(item.seconds) > 10
        assert sorted(item.seconds)[int(0.9 * len(item.seconds))] < 2e-3  # after the other, a call takes 3 ms


def test_a_limit_holds_and_is_used_up_on_a_machine_that_became_slower():
    slow = []

    def step():
        slow.append(1)
        time.sleep(0.03 if len(slow) > 4 else 1e-3)

    timed = {"free": Timed(step), "limited": Timed(lambda: None, max_rounds=5)}
    for item in timed.values():
        item.warm_seconds = 1e-3  # as it was before the machine became slow
    run_rounds(timed, 0.05)
    assert len(timed["free"].seconds) >= MIN_ROUNDS
    assert MIN_ROUNDS <= len(timed["limited"].seconds) <= 5


def test_a_step_that_raises_in_a_round_costs_the_others_nothing():
    calls, said = [], []

    def step():
        calls.append(1)
        if len(calls) > 20:
            raise RuntimeError("planted")

    timed = {"good": Timed(lambda: time.sleep(1e-3)), "bad": Timed(step)}
    for item in timed.values():
        item.warm_seconds = 1e-3
    run_rounds(timed, 0.5, on_error=lambda name, error: said.append((name, str(error))))
    assert said == [("bad", "planted")]  # once
    assert len(timed["good"].seconds) > 25
    with pytest.raises(RuntimeError, match="planted"):
        run_rounds({"bad": Timed(step, warm_seconds=1e-3)}, 0.1)


def test_long_rounds_give_signs_of_life(monkeypatch):
    monkeypatch.setattr("bench.rounds.SIGN_SECONDS", 0.05)
    signs = []
    timed = Timed(lambda: time.sleep(0.01), warm_seconds=0.01)
    run_rounds({"step": timed}, 0.5, on_sign=signs.append)
    assert 2 <= len(signs) < len(timed.seconds)
    assert signs[0].startswith("round ")


BURN = "import time\nend = time.process_time() + 0.1\nwhile time.process_time() < end: pass"


def test_processes_that_end_inside_a_step_are_counted():
    timed = Timed(lambda: subprocess.run([sys.executable, "-S", "-c", BURN], check=True), warm_seconds=0.1)
    run_rounds({"step": timed}, 0.2)
    assert all(0.09 < cpu < 1.0 for cpu in timed.cpu_seconds)


def test_all_is_timed_within_the_seconds_but_for_the_cold_calls():
    calls = []

    def compiling():
        calls.append(1)
        time.sleep(0.6 if len(calls) == 1 else 1e-4)

    timed = {"base": Timed(compiling), "new": Timed(compiling)}
    begin = time.perf_counter()
    time_together(timed, 0.5)
    took = time.perf_counter() - begin
    cold = sum(item.cold_seconds for item in timed.values())
    assert cold > 0.6  # more than the 0.5 s
    assert took - cold > 0.4
    assert min(len(item.seconds) for item in timed.values()) > 10


def test_a_clock_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="there is host, jax, cuda"):
        clock("sundial")
