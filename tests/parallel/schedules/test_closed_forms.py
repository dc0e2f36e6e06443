"""Every schedule can be executed, and what the papers say of its bubble and its activations is so."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel import schedules
from parallel.schedules import Durations, dualpipe_v

EQUAL = Durations(forward=1.0, input_gradient=1.0, weight_gradient=1.0)
LOOPED = ("interleaved_1f1b", "looped_bfs")

names = st.sampled_from(schedules.NAMES)
ranks, microbatches = st.integers(1, 9), st.integers(1, 30)


def stages_a_rank(name, drawn):
    return drawn if name in LOOPED else None


@settings(max_examples=150)
@given(names, ranks, microbatches, st.integers(2, 4))
def test_every_schedule_is_valid_with_and_without_its_communication(name, p, m, v):
    schedule = schedules.build(name, p, m, stages_a_rank(name, v))
    schedules.validate(schedule)
    complete = schedules.with_communication(schedule)
    schedules.validate(complete)
    again = schedules.without_communication(complete)
    for rank in range(p):
        assert again.actions(rank) == schedule.actions(rank)


@settings(max_examples=150)
@given(names, ranks, microbatches, st.integers(2, 4))
def test_the_simulated_bubble_is_the_closed_form(name, p, m, v):
    v = stages_a_rank(name, v)
    expected = schedules.bubble(name, p, m, v)
    timeline = schedules.simulate(schedules.build(name, p, m, v), EQUAL)
    if expected is not None:
        assert timeline.bubble == pytest.approx(expected, abs=1e-12)
    else:
        assert timeline.bubble >= 0


@settings(max_examples=150)
@given(names, ranks, microbatches, st.integers(2, 4))
def test_the_activations_held_are_the_closed_form(name, p, m, v):
    v = stages_a_rank(name, v)
    held = schedules.peak_activations(schedules.build(name, p, m, v)).tolist()
    expected = [schedules.activations(name, p, m, rank, v) for rank in range(p)]
    if name == "v_half" and m < p + 2:  # a bound where the pipeline does not fill
        assert all(one <= most for one, most in zip(held, expected, strict=True))
    else:
        assert held == expected


@pytest.mark.parametrize(
    ("name", "p", "m", "bubble"),
    [  # measured of PyTorch's own, or by hand
        ("gpipe", 4, 8, 3 / 11),
        ("1f1b", 4, 8, 3 / 11),
        ("interleaved_1f1b", 4, 8, 3 / 19),
        ("looped_bfs", 4, 8, 3 / 19),
        ("zb_h1", 4, 8, 1 / 9),
        ("zb_v", 4, 8, 1 / 17),
        ("zb_v", 4, 16, 1 / 33),
        ("zb_v", 2, 8, 1 / 49),
    ],
)
def test_known_bubbles(name, p, m, bubble):
    assert schedules.bubble(name, p, m) == pytest.approx(bubble)
    assert schedules.simulate(schedules.build(name, p, m), EQUAL).bubble == pytest.approx(bubble)


@settings(max_examples=40)
@given(ranks, st.integers(0, 12))
def test_dualpipe_v_with_its_pairs_as_one_action_has_the_published_bubble(p, more):
    m = 2 * p + more
    timeline = schedules.simulate(schedules.build("dualpipe_v", p, m), EQUAL, side_by_side=True)
    assert timeline.bubble == pytest.approx(2 * (p - 1) / (6 * m + 2 * (p - 1)), abs=1e-12)
    assert timeline.bubble == pytest.approx(dualpipe_v.bubble_side_by_side(p, m), abs=1e-12)


@pytest.mark.parametrize("p", [4, 8, 16])
def test_v_half_holds_about_half_of_1f1b_and_idles_no_longer(p):
    half, whole = (schedules.build(name, p, 3 * p) for name in ("v_half", "1f1b"))
    layers = 1 / 2  # a stage of the V is half of a rank's layers
    share = schedules.peak_activations(half, layers).max() / schedules.peak_activations(whole).max()
    assert share == (p + 2) / (2 * p)
    assert schedules.simulate(half, EQUAL).bubble < schedules.simulate(whole, Durations(2.0, 2.0, 2.0)).bubble


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zb_3", 2, 4), "no schedule 'zb_3'; there are gpipe, "),
        (("1f1b", 0, 4), "at least one rank, not 0"),
        (("1f1b", 2, 0), "at least one micro-batch, not 0"),
        (("zb_v", 2, 4, 3), "zb_v has 2 stages a rank, not 3"),
        (("looped_bfs", 2, 4, 1), "looped_bfs has 2 or more stages a rank, not 1"),
    ],
)
def test_what_cannot_be_built_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        schedules.build(*arguments)
