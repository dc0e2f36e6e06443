"""Memory over time: the peak and its place, and what a step leaves behind."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tables_of_events import MAIN, trace

from bench.traces.analysis import analyse
from bench.traces.events import Kind, Memory
from bench.traces.memory import memory_use
from bench.traces.steps import steps


def loop(samples, number_of_steps=4):
    """Steps of 100 ns with one operator in the middle of each; samples of (time, bytes, device)."""
    rows = []
    for step in range(number_of_steps):
        rows.append((Kind.STEP, f"ProfilerStep#{step}", MAIN, 100 * step, 100 * step + 100))
        rows.append((Kind.OPERATOR, "aten::mm", MAIN, 100 * step + 20, 100 * step + 80))
        rows.append((Kind.OPERATOR, "aten::empty", MAIN, 100 * step + 30, 100 * step + 40))
    columns = np.array(samples, np.int64).reshape(-1, 3).T
    return trace(rows, memory=Memory(columns[0], columns[1], columns[2].astype(np.int32)))


def use(made):
    return memory_use(made, steps(made))


def test_the_peak_and_what_ran_then():
    found = use(loop([(10, 100, 0), (135, 900, 0), (150, 300, 0), (390, 50, 0)]))[0]
    assert (found.device, found.samples, found.peak, found.first, found.last) == (0, 4, 900, 100, 50)
    assert (found.peak_time, found.peak_step, found.peak_operator) == (135, "ProfilerStep#1", "aten::empty")


def test_a_peak_between_operators_and_steps():
    found = use(loop([(95, 10, -1), (405, 20, -1)]))[0]
    assert (found.peak_step, found.peak_operator) == ("", "")


def test_a_loop_that_leaks_leaves_as_much_in_each_step():
    leak = [(100 * step + 50, 1000 + 64 * step, 0) for step in range(4)]
    churn = [(100 * step + 60, 5000, 0) for step in range(4)] + [
        (100 * step + 70, 1000, 0) for step in range(4)
    ]
    assert use(loop(leak))[0].growth == 64
    assert use(loop(churn))[0].growth == 0
    assert use(loop(leak, number_of_steps=2))[0].growth is None


def test_of_one_step_the_peak_is_its_own_and_the_growth_that_of_the_loop():
    made = loop([(100 * step + 50, 1000 + 64 * step, 0) for step in range(4)])
    (found,) = memory_use(made, steps(made), (100, 200))
    assert (found.samples, found.peak, found.first, found.last) == (1, 1064, 1064, 1064)
    assert found.growth == 64
    assert analyse(made, "1").memory == [found]
    assert memory_use(made, steps(made), (400, 500)) == []


def test_devices_are_apart_and_a_trace_without_samples_has_none():
    found = use(loop([(10, 7, 1), (20, 5, -1), (30, 9, 1)]))
    assert [(one.device, one.peak) for one in found] == [(-1, 5), (1, 9)]
    assert use(loop([])) == []


@given(st.integers(1, 3000), st.integers(0, 2**32 - 1))
def test_the_curve_is_short_and_keeps_the_peak(samples, seed):
    sizes = np.random.default_rng(seed).integers(0, 1000, samples).tolist()
    found = use(loop([(time, size, 0) for time, size in enumerate(sizes)]))[0]
    assert len(found.curve) <= 400
    assert max(size for _, size in found.curve) == max(sizes) == found.peak
    times = [time for time, _ in found.curve]
    assert times == sorted(set(times))
    assert all(sizes[time] == size for time, size in found.curve)
