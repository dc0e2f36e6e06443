"""What is certain about a change, and what is not."""

import math

import numpy as np
import pytest

from bench.traces.diff_estimate import Sample, estimate, in_turns

SHARES = np.array([30.0, 20, 10, 10, 5, 5, 5, 5, 5, 5])


def sample(rng, steps, factor=1.0, start=None, noise=0.01):
    """Ten operations that take 100 us a step in all, each with noise of its own."""
    values = 1000 * SHARES * factor * np.exp(noise * rng.standard_normal((steps, len(SHARES))))
    return Sample(values, np.arange(steps) if start is None else start, start is not None)


def compared(base, new):
    every = np.ones(len(SHARES), bool)
    return estimate(base, new, scales=every, witnesses=every)


def one_slower(share=0.1, index=0):
    factor = np.ones(len(SHARES))
    factor[index] += share
    return factor


def test_the_same_recording_is_the_same():
    base = sample(np.random.default_rng(0), 3)
    assert compared(base, base).step.verdict == "same"


def test_equal_work_with_noise_is_the_same_and_no_operation_stands_out():
    rng = np.random.default_rng(1)
    found = compared(sample(rng, 40), sample(rng, 40))
    assert found.step.verdict == "same"
    assert (np.abs(found.excess) <= found.reach).all()


def test_one_operation_slower_is_found_and_contributions_sum_to_the_change():
    rng = np.random.default_rng(2)
    found = compared(sample(rng, 40), sample(rng, 40, one_slower()))
    assert found.step.verdict == "slower"
    certain = np.abs(found.excess) - found.reach
    assert int(np.argmax(certain)) == 0
    assert (certain[1:] < 0).all()
    alike = (found.alike - 1) * found.base.sum()
    assert found.excess.sum() + alike == pytest.approx(found.new.sum() - found.base.sum())


def test_everything_slower_alike_is_undecidable_and_no_operation_is_blamed():
    """As a neighbour on the same cores, or a lower clock, does it."""
    rng = np.random.default_rng(3)
    found = compared(sample(rng, 40), sample(rng, 40, 1.3))
    assert found.alike == pytest.approx(1.3, rel=0.01)
    assert found.step.verdict == "undecidable"
    assert (np.abs(found.excess) <= found.reach).all()


def test_a_change_is_found_on_a_slower_machine():
    rng = np.random.default_rng(4)
    found = compared(sample(rng, 40), sample(rng, 40, 1.2 * one_slower(0.2)))
    assert int(np.argmax(np.abs(found.excess) - found.reach)) == 0
    assert found.step.verdict == "slower"


@pytest.mark.parametrize("steps", [1, 4])
def test_few_steps_have_no_interval(steps):
    rng = np.random.default_rng(5)
    found = compared(sample(rng, steps), sample(rng, steps, one_slower(2.0)))
    assert found.step.verdict == "undecidable"
    assert (found.step.low, found.step.high) == (0.0, math.inf)
    assert np.isinf(found.reach).all()
    assert int(np.argmax(np.abs(found.excess))) == 0  # what contributes most can be told all the same


def test_recordings_in_turns_see_through_a_machine_that_changes_its_mood():
    """Its speed wanders by tens of percent; stretches of 3 steps, base and new in turns."""
    rng = np.random.default_rng(6)
    time = np.arange(240)
    mood = np.exp(np.cumsum(0.03 * rng.standard_normal(240)))[:, None]
    is_new = (time // 3) % 2 == 1

    def recorded(rows, factor=1.0):
        steps = sample(rng, len(rows), factor)
        return Sample(steps.nanoseconds * mood[rows], 10**18 + rows, True)

    base, new = np.flatnonzero(~is_new), np.flatnonzero(is_new)
    assert len(in_turns(recorded(base), recorded(new))) == 79
    same = compared(recorded(base), recorded(new))
    assert same.step.verdict != "slower"
    assert same.step.low < 1 < same.step.high
    slower = compared(recorded(base), recorded(new, one_slower(0.3)))
    assert slower.step.verdict == "slower"
    assert int(np.argmax(np.abs(slower.excess) - slower.reach)) == 0


def test_clocks_that_are_not_absolute_are_never_paired():
    rng = np.random.default_rng(7)
    base = Sample(sample(rng, 20).nanoseconds, np.arange(0, 40, 2), False)
    new = Sample(sample(rng, 20).nanoseconds, np.arange(1, 41, 2), False)
    assert in_turns(base, new) == []


def test_what_happens_in_every_fourth_step_counts_by_its_mean():
    rng = np.random.default_rng(8)
    base, new = sample(rng, 40), sample(rng, 40)
    new.nanoseconds[:, 9] = np.where(np.arange(40) % 4 == 0, 40_000.0, 0.0)
    base.nanoseconds[:, 9] = 0.0
    assert compared(base, new).excess[9] == pytest.approx(10_000)


@pytest.mark.proof
@pytest.mark.parametrize("steps", [5, 8, 12, 40])
def test_equal_work_is_hardly_ever_called_slower_or_faster(steps):
    """Noise of 5 % a step in each operation, 200 pairs: at most 5 % false alarms, of steps and of rows."""
    rng = np.random.default_rng(9)
    alarms = rows = 0
    for _ in range(200):
        found = compared(sample(rng, steps, noise=0.05), sample(rng, steps, noise=0.05))
        alarms += found.step.verdict in ("slower", "faster")
        rows += bool((np.abs(found.excess) - found.reach > 0.02 * found.base).any())
    assert alarms <= 10
    assert rows <= 10


def test_what_takes_five_times_as_long_is_no_mood_of_the_machine():
    rng = np.random.default_rng(6)
    found = compared(sample(rng, 40), sample(rng, 40, 5.0))
    assert found.alike == 1.0
    assert found.step.verdict == "slower"
