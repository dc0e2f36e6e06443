"""The schedule that is chosen is the fastest that fits."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel import schedules
from parallel.schedules import Durations, Link

seconds = st.floats(0.1, 5.0)


@settings(max_examples=25)
@given(
    st.integers(1, 5),
    st.integers(1, 12),
    st.sampled_from([1, 2, 4]),
    st.tuples(seconds, seconds, seconds),
    st.floats(0, 1),
    st.floats(0, 0.5),
    st.integers(4, 30),
)
def test_nothing_that_fits_is_faster(p, m, pieces, times, latency, overhead, limit):
    link, stages = Link(latency), p * pieces
    kept = {"link": link, "overhead": overhead}
    steps = {}
    for name in schedules.NAMES:
        for v in {schedules.usual_stages_per_rank(name), pieces}:
            if pieces % v or not schedules.allows(name, v):
                continue
            schedule, joined = schedules.build(name, p, m, v), pieces // v
            durations = Durations(*(joined * value for value in times))
            if schedules.peak_activations(schedule, joined).max() <= limit:
                steps[name, v] = schedules.simulate(schedule, durations, **kept).step
    if steps:
        choice = schedules.best_schedule(stages, m, Durations(*times), limit, world_size=p, **kept)
        assert choice.best.step <= min(steps.values()) * (1 + 1e-9)
        assert choice.best.peak <= limit
    else:
        with pytest.raises(ValueError, match="no schedule holds its activations in"):
            schedules.best_schedule(stages, m, Durations(*times), limit, world_size=p, **kept)


def test_less_memory_another_schedule():
    """Zero-bubble while it fits; half of its memory at the price of a bubble; then nothing."""
    equal = Durations(1.0, 1.0, 1.0)
    names = [
        schedules.best_schedule(8, 16, equal, limit, world_size=4).best.schedule.name for limit in (None, 7)
    ]
    assert names == ["zb_v", "v_half"]
    with pytest.raises(ValueError, match="holds its activations in 5; v_half needs least, 6"):
        schedules.best_schedule(8, 16, equal, 5, world_size=4)


def test_overhead_decides_for_fewer_actions():
    equal = Durations(1.0, 1.0, 1.0)
    assert schedules.best_schedule(4, 16, equal, world_size=2).best.schedule.name == "zb_v"
    slow = schedules.best_schedule(4, 16, equal, world_size=2, overhead=3.0).best
    assert slow.schedule.name in ("gpipe", "1f1b")


def test_neighbours_are_taken_as_one_stage():
    """Pieces of different lengths: one-stage schedules get sums of times and sizes, and the last's bytes."""
    choice = schedules.best_schedule(
        4,
        3,
        Durations([1.0, 2.0, 3.0, 4.0], 1.0, 1.0),
        world_size=2,
        size=[1.0, 10.0, 100.0, 1000.0],
        link=Link(0.0, 1.0, [5.0, 7.0, 9.0, 0.0]),
    )
    gpipe = next(one for one in choice.considered if one.schedule.name == "gpipe")
    expected = schedules.simulate(
        schedules.build("gpipe", 2, 3), Durations([3.0, 7.0], 2.0, 2.0), Link(0.0, 1.0, [7.0, 0.0])
    )
    assert (gpipe.step, gpipe.bubble) == pytest.approx((expected.step, expected.bubble))
    assert gpipe.peak == 3300.0


def test_stages_that_do_not_divide_are_an_error():
    with pytest.raises(ValueError, match="6 stages do not divide among 4 ranks"):
        schedules.best_schedule(6, 4, Durations(1.0, 1.0, 1.0), world_size=4)
