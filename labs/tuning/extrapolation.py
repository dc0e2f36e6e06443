"""The end of a learning curve, from its beginning.

  loss(t) = end + scale t^-power

by least squares: end and scale have a closed form for each power, and the powers are a grid. Losses that do
not fall, or fewer than three of them, are taken to stay where they are.

Source: the family pow3 of Domhan et al. 2015, table 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

POWERS = tuple(0.1 * 1.3**place for place in range(12))  # 0.1 to 1.8


def fitted(steps: Sequence[int], losses: Sequence[float], power: float) -> tuple[float, float, float]:
    """(end, scale, sum of squares) of the best curve with this power."""
    xs = [step**-power for step in steps]
    mean_x, mean_y = sum(xs) / len(xs), sum(losses) / len(losses)
    spread = sum((x - mean_x) ** 2 for x in xs)
    scale = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, losses, strict=True)) / spread
    end = mean_y - scale * mean_x
    squares = sum((end + scale * x - y) ** 2 for x, y in zip(xs, losses, strict=True))
    return end, scale, squares


def extrapolated(steps: Sequence[int], losses: Sequence[float], most: int) -> float:
    """The loss after ``most`` steps (nats), or NaN where one of the losses is no number.

    ValueError: no losses, steps that do not increase from 1, or as many steps as losses are not given.
    """
    if not steps or len(steps) != len(losses):
        raise ValueError(f"{len(steps)} steps and {len(losses)} losses: give as many of both, at least one")
    if steps[0] < 1 or any(low >= high for low, high in itertools.pairwise(steps)):
        raise ValueError(f"steps={list(steps)} have to increase, from 1")
    if not all(map(math.isfinite, losses)):
        return math.nan
    if len(steps) < 3:
        return losses[-1]
    power, (end, scale, _) = min(
        ((power, fitted(steps, losses, power)) for power in POWERS), key=lambda fit: fit[1][2]
    )
    return min(end + scale * most**-power, losses[-1]) if scale > 0 else losses[-1]
