"""What is searched: hyperparameters of AdamW, drawn at random, and mutated by population based training."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, fields, replace

LEARNING_RATE = (1e-3, 1e-1)
MOMENTUM_LOSS = (3e-2, 3e-1)
VARIANCE_LOSS = (1e-3, 1e-1)
WEIGHT_DECAY = (1e-3, 1.0)
BOUNDS = (LEARNING_RATE, MOMENTUM_LOSS, VARIANCE_LOSS, WEIGHT_DECAY)
FACTORS = (0.8, 1.25)
"""Of a mutation; Jaderberg et al. 2017, section 4.1, takes 0.8 and 1.2: then ten up and ten down are a drift
of a third downwards."""


@dataclass(frozen=True)
class Point:
    """One configuration. All of it is numbers of the optimizer: shapes and steps cost the same everywhere.

    momentum_loss: 1 - beta1 of AdamW. variance_loss: 1 - beta2.
    """

    learning_rate: float
    momentum_loss: float
    variance_loss: float
    weight_decay: float

    @property
    def values(self) -> tuple[float, ...]:
        return tuple(getattr(self, item.name) for item in fields(self))


def draw(count: int, seed: int) -> list[Point]:
    """``count`` points, each number log-uniform between its bounds. More points begin with the fewer.

    ValueError: no points, or a negative seed.
    """
    if count < 1 or seed < 0:
        raise ValueError(f"count={count} points with seed={seed}: draw at least 1, with a seed from 0")
    generator = random.Random(seed)
    return [
        Point(*(math.exp(generator.uniform(math.log(low), math.log(high))) for low, high in BOUNDS))
        for _ in range(count)
    ]


def mutated(point: Point, generator: random.Random) -> Point:
    """Each number times 0.8 or 1.25, and not past its bounds."""
    names = [item.name for item in fields(point)]
    changed = {
        name: min(max(value * generator.choice(FACTORS), low), high)
        for name, value, (low, high) in zip(names, point.values, BOUNDS, strict=True)
    }
    return replace(point, **changed)
