"""Ranks that are late now and then, and what it costs to wait for them.

A synchronous step ends when the last rank has finished: with independent delays D it takes, on average, the
compute time and E[max of p delays]. Ranks that meet every H steps only wait for the largest *sum* of H
delays, and sums vary less around their mean: E[max of p sums of H] / H a step, which falls towards E[D].
What does not fall is E[D] itself: a rank that is always late holds up everybody, however rarely they meet.

Both are ``every=1`` and ``every=H`` of one formula, E[max of p] = integral of 1 - F(t)^p over t >= 0, for the
distribution function F of the sum of H delays (Dekel et al. and Dean & Barroso 2013, "The Tail at Scale").
"""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Delay(Protocol):
    """A distribution of delays in seconds."""

    def draw(self, chance: random.Random) -> float:
        """One delay."""

    def expected_maximum(self, world_size: int, every: int) -> float:
        """E[max over ``world_size`` ranks of the sum of ``every`` independent delays], in seconds."""


@dataclass(frozen=True)
class Constant:
    """Always late by as much."""

    seconds: float

    def draw(self, chance: random.Random) -> float:
        return self.seconds

    def expected_maximum(self, world_size: int, every: int) -> float:
        return self.seconds * every


@dataclass(frozen=True)
class Occasional:
    """Late by ``seconds`` with this probability: a garbage collection, a page fault storm, a neighbour."""

    probability: float
    seconds: float

    def draw(self, chance: random.Random) -> float:
        return self.seconds if chance.random() < self.probability else 0.0

    def expected_maximum(self, world_size: int, every: int) -> float:
        """The sum is binomial, so the integral is a sum over how often one was late."""
        p, below, total = self.probability, 0.0, 0.0
        for count in range(every):
            below += math.comb(every, count) * p**count * (1 - p) ** (every - count)
            total += 1 - min(below, 1.0) ** world_size
        return total * self.seconds


@dataclass(frozen=True)
class Exponential:
    """Delays with this mean in seconds; of p, the largest is 1 + 1/2 + ... + 1/p times as long."""

    mean: float

    def draw(self, chance: random.Random) -> float:
        return chance.expovariate(1 / self.mean)

    def expected_maximum(self, world_size: int, every: int) -> float:
        """The sum is Erlang's: P(sum > t) = exp(-x) * sum of x^k / k! for k < ``every``, with x = t /
        mean."""
        end = every + 12 * math.sqrt(every) + 12 * math.log(world_size + 1) + 30
        points = 4000
        width, total = end / points, 0.0
        for i in range(points):  # midpoints: the error is of the order of width^2
            x = (i + 0.5) * width
            term = later = math.exp(-x)
            for k in range(1, every):
                term *= x / k
                later += term
            total += -math.expm1(world_size * math.log1p(-min(later, 1 - 1e-15)))
        return total * width * self.mean


def expected_step_seconds(
    compute: float, delay: Delay, world_size: int, every: int = 1, exchange: float = 0.0
) -> float:
    """Expected seconds of one step: computing, waiting for the last rank every ``every`` steps, and
    exchanging then.

    compute, exchange: seconds of a step's computing and of one averaging.
    """
    return compute + (delay.expected_maximum(world_size, every) + exchange) / every


def realized_seconds(
    delays: Sequence[Sequence[float]], compute: float, every: int = 1, exchange: float = 0.0
) -> float:
    """Seconds that these delays, [step][rank], cost: the same sum with what was drawn instead of what is
    expected."""
    total = compute * len(delays)
    for first in range(0, len(delays), every):
        by_rank = zip(*delays[first : first + every], strict=True)
        total += max(map(sum, by_rank)) + exchange
    return total


@dataclass(frozen=True)
class Straggler:
    """Delays ranks, each step independently, the same way in every run with this seed.

    ranks: those that are delayed; None: all of them.
    """

    delay: Delay
    seed: int = 0
    ranks: tuple[int, ...] | None = None

    def seconds(self, rank: int, step: int) -> float:
        """How long ``rank`` is late in ``step``. Every rank can tell for every other."""
        if self.ranks is not None and rank not in self.ranks:
            return 0.0
        return self.delay.draw(random.Random(f"{self.seed} {rank} {step}"))

    def wait(self, rank: int, step: int) -> float:
        """Sleep so long (the processor is free meanwhile); returns it."""
        seconds = self.seconds(rank, step)
        time.sleep(seconds)
        return seconds
