"""GPipe: all micro-batches forward, then all backward (Huang et al. 2019, "GPipe", section 2.3).

Simple, and as much bubble as 1F1B; but a rank holds the activations of every micro-batch.
"""

from parallel.schedules.actions import Action, Kind, Schedule, columns
from parallel.schedules.placement import looped


def build(world_size: int, microbatches: int) -> Schedule:
    """One stage a rank."""
    ranks = [
        columns(
            Action(kind, rank, micro)
            for kind in (Kind.FORWARD, Kind.BACKWARD)
            for micro in range(microbatches)
        )
        for rank in range(world_size)
    ]
    return Schedule("gpipe", looped(world_size), microbatches, tuple(ranks))


def bubble(world_size: int, microbatches: int) -> float:
    """Idle share of the step, (p-1)/(m+p-1), when all stages take the same time."""
    return (world_size - 1) / (microbatches + world_size - 1)


def activations(world_size: int, microbatches: int, rank: int) -> int:
    """Most activations of a stage that ``rank`` holds at once."""
    return microbatches
