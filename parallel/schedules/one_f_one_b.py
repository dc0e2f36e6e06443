"""1F1B: a rank goes forward until the first gradient can reach it, then one forward, one backward
(Narayanan et al. 2019, "PipeDream", section 3.2; with a flush at the end of the step: Narayanan et al. 2021,
"Efficient Large-Scale Language Model Training on GPU Clusters", section 2.2.1).

The bubble is GPipe's; the activations held are bounded by the number of ranks instead of micro-batches.
"""

import numpy as np

from parallel.schedules.actions import Kind, Schedule
from parallel.schedules.placement import looped


def build(world_size: int, microbatches: int) -> Schedule:
    """One stage a rank."""
    ranks = [
        _rank(rank, microbatches, activations(world_size, microbatches, rank)) for rank in range(world_size)
    ]
    return Schedule("1f1b", looped(world_size), microbatches, tuple(ranks))


def _rank(stage: int, microbatches: int, ahead: int) -> np.ndarray:
    """As columns at once: there may be thousands of micro-batches. ``ahead``: forwards before the first
    backward."""
    actions = np.empty((2 * microbatches, 3), np.int32)
    actions[:, 1] = stage
    numbers = np.arange(microbatches)
    forward = np.where(numbers < ahead, numbers, 2 * numbers - ahead + 1)
    backward = np.minimum(2 * numbers + ahead, numbers + microbatches)
    actions[forward, 0], actions[forward, 2] = Kind.FORWARD, numbers
    actions[backward, 0], actions[backward, 2] = Kind.BACKWARD, numbers
    return actions


def bubble(world_size: int, microbatches: int) -> float:
    """Idle share of the step, (p-1)/(m+p-1), when all stages take the same time."""
    return (world_size - 1) / (microbatches + world_size - 1)


def activations(world_size: int, microbatches: int, rank: int) -> int:
    """Most activations of a stage that ``rank`` holds at once: p on the first rank, 1 on the last."""
    return min(world_size - rank, microbatches)
