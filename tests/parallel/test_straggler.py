"""What waiting for late ranks costs: the formula against drawing, and against real ranks that sleep."""

import random
import time

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from parallel.local_sgd import LocalSGD
from parallel.straggler import (
    Constant,
    Exponential,
    Occasional,
    Straggler,
    expected_step_seconds,
    realized_seconds,
)

DELAYS = [Constant(0.2), Occasional(0.1, 3.0), Exponential(0.5)]


@pytest.mark.parametrize("delay", DELAYS, ids=lambda delay: type(delay).__name__)
@pytest.mark.parametrize(("world_size", "every"), [(1, 1), (2, 1), (4, 1), (4, 8)])
def test_the_expected_maximum_is_the_mean_of_many_draws(delay, world_size, every):
    chance, draws = random.Random(5), 4000
    found = [
        max(sum(delay.draw(chance) for _ in range(every)) for _ in range(world_size)) for _ in range(draws)
    ]
    mean = sum(found) / draws
    error = (sum((x - mean) ** 2 for x in found) / draws / draws) ** 0.5
    assert delay.expected_maximum(world_size, every) == pytest.approx(mean, abs=4 * error + 1e-9)


@pytest.mark.parametrize("world_size", [1, 2, 3, 64, 1000])
def test_the_largest_of_exponential_delays_is_the_harmonic_number(world_size):
    harmonic = sum(1 / k for k in range(1, world_size + 1))
    assert Exponential(2.0).expected_maximum(world_size, 1) == pytest.approx(2 * harmonic, rel=1e-4)


@given(st.sampled_from(DELAYS), st.integers(1, 16), st.integers(1, 32))
def test_meeting_rarely_never_costs_more_and_never_less_than_the_mean(delay, world_size, every):
    mean = delay.expected_maximum(1, 1)
    synchronous = expected_step_seconds(1.0, delay, world_size)
    local = expected_step_seconds(1.0, delay, world_size, every)
    assert 1.0 + mean <= local + 1e-4
    assert local <= synchronous + 1e-4


def test_the_same_seed_delays_the_same_ranks():
    one = Straggler(Exponential(1.0), seed=3, ranks=(1, 2))
    assert [one.seconds(r, s) for r in range(3) for s in range(5)] == [
        Straggler(Exponential(1.0), seed=3, ranks=(1, 2)).seconds(r, s) for r in range(3) for s in range(5)
    ]
    assert one.seconds(0, 1) == 0
    assert len({one.seconds(r, s) for r in (1, 2) for s in range(50)}) == 100
    assert Straggler(Exponential(1.0), seed=4).seconds(1, 0) != one.seconds(1, 0)
    assert Straggler(Constant(1.0)).seconds(7, 0) == 1


def test_what_was_drawn_adds_up():
    delays = [[1.0, 0.0], [0.0, 2.0], [0.0, 1.0], [4.0, 0.0]]
    assert realized_seconds(delays, 10.0) == 40 + 1 + 2 + 1 + 4
    assert realized_seconds(delays, 10.0, every=2) == 40 + 2 + 4
    assert realized_seconds(delays, 10.0, every=4, exchange=0.5) == 40 + 5 + 0.5
    assert realized_seconds(delays, 10.0, every=3) == 40 + 3 + 4


def late(straggler, steps, every):
    """Seconds that ``steps`` steps take with sleeping ranks, as rank 0 sees them."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = LocalSGD(model, torch.optim.SGD(model.parameters()), every)
    dist.barrier()
    began = time.monotonic()
    for step in range(steps):
        straggler.wait(dist.get_rank(), step)
        optimizer.zero_grad()
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    dist.barrier()
    return time.monotonic() - began


@pytest.mark.alone
def test_ranks_that_sleep_take_what_was_drawn(ranks):
    """Sleeping is never shorter than asked, so what was drawn is a lower bound however busy the machine
    is."""
    straggler, steps = Straggler(Occasional(0.5, 0.02), seed=1), 24
    delays = [[straggler.seconds(rank, step) for rank in range(3)] for step in range(steps)]
    drawn = {every: realized_seconds(delays, 0.0, every) for every in (1, 8)}
    taken = {every: min(ranks.run(3, late, straggler, steps, every)) for every in (1, 8)}
    assert drawn[8] < 0.8 * drawn[1]
    for every in (1, 8):
        assert taken[every] >= drawn[every]
        assert taken[every] < drawn[every] + 24 * 0.02
