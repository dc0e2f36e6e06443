"""Interleaved 1F1B: each rank holds several stages, a v-th as long, so that the pipeline fills v times as
fast (Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters", section 2.2.2).

Micro-batches go in groups of as many as there are ranks: a group passes the rank's first stage, then its
second and so on, then comes the next group. If the groups do not come out even, the last is smaller and a
little of the gain is lost. The price: v times the messages, and more activations than 1F1B.
"""

from collections.abc import Iterator

from parallel.schedules.actions import Action, Kind, Schedule, columns
from parallel.schedules.placement import looped


def interleaved_1f1b(world_size: int, microbatches: int, stages_per_rank: int = 2) -> Schedule:
    """``stages_per_rank`` stages a rank, placed round the ranks."""
    ranks = []
    for rank in range(world_size):
        stages = range(rank, world_size * stages_per_rank, world_size)
        forwards = list(_actions(Kind.FORWARD, stages, world_size, microbatches))
        backwards = list(_actions(Kind.BACKWARD, stages[::-1], world_size, microbatches))
        ahead = activations(world_size, microbatches, rank, stages_per_rank)
        actions = forwards[:ahead]
        for forward, backward in zip(forwards[ahead:], backwards, strict=False):
            actions += backward, forward
        ranks.append(columns(actions + backwards[len(forwards) - ahead :]))
    return Schedule("interleaved_1f1b", looped(world_size, stages_per_rank), microbatches, tuple(ranks))


def _actions(kind: Kind, stages: range, group: int, microbatches: int) -> Iterator[Action]:
    for first in range(0, microbatches, group):
        for stage in stages:
            for micro in range(first, min(first + group, microbatches)):
                yield Action(kind, stage, micro)


def bubble(world_size: int, microbatches: int, stages_per_rank: int = 2) -> float:
    """Idle share of the step, (p-1)/(vm+p-1), when all stages take the same time and p divides m."""
    return (world_size - 1) / (stages_per_rank * microbatches + world_size - 1)


def activations(world_size: int, microbatches: int, rank: int, stages_per_rank: int = 2) -> int:
    """Most activations of a stage (a v-th of a rank's layers) that ``rank`` holds at once: the forwards before
    its first backward. (v-1) groups pass its other stages; then two for each rank behind it, because a
    forward and a backward take turns, and one of its own."""
    ahead = (stages_per_rank - 1) * min(world_size, microbatches) + 2 * (world_size - 1 - rank) + 1
    return min(ahead, microbatches * stages_per_rank)
