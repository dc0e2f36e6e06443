"""Breadth-first: each rank holds several stages and passes all micro-batches through one before the next
(Lamy-Poirier 2023, "Breadth-First Pipeline Parallelism", section 3).

Interleaved 1F1B's bubble, for the memory of GPipe; the weights of a stage are used in one go, which suits
sharded weights: they are gathered once for all micro-batches.
"""

from parallel.schedules.actions import Action, Kind, Schedule, columns
from parallel.schedules.placement import looped


def build(world_size: int, microbatches: int, stages_per_rank: int = 2) -> Schedule:
    """``stages_per_rank`` stages a rank, placed round the ranks."""
    ranks = []
    for rank in range(world_size):
        stages = range(rank, world_size * stages_per_rank, world_size)
        phases = [(Kind.FORWARD, stage) for stage in stages]
        phases += [(Kind.BACKWARD, stage) for stage in reversed(stages)]
        ranks.append(
            columns(Action(kind, stage, micro) for kind, stage in phases for micro in range(microbatches))
        )
    return Schedule("looped_bfs", looped(world_size, stages_per_rank), microbatches, tuple(ranks))


def bubble(world_size: int, microbatches: int, stages_per_rank: int = 2) -> float:
    """Idle share of the step, (p-1)/(vm+p-1), when all stages take the same time. With m < p each round but
    the last takes p instead of m: the first micro-batch has to come round."""
    rounds = (stages_per_rank - 1) * max(world_size, microbatches) + microbatches
    return 1 - stages_per_rank * microbatches / (rounds + world_size - 1)


def activations(world_size: int, microbatches: int, rank: int, stages_per_rank: int = 2) -> int:
    """Most activations of a stage that ``rank`` holds at once: all."""
    return microbatches * stages_per_rank
