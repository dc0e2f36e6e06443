"""Interleaved 1F1B: each rank holds several stages, a v-th as long, so that the pipeline fills v times as
fast (Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters", section 2.2.2).

Micro-batches go in groups: a group passes the rank's first stage, then its second and so on, then comes the
next group. A group has as many micro-batches as there are ranks, or a few more where they do not come out
even: with fewer, the next stage would wait for them to come round. The price of the smaller bubble: v times
the messages, and more activations than 1F1B.
"""

from itertools import accumulate, pairwise

from parallel.schedules.actions import Action, Kind, Schedule, columns
from parallel.schedules.placement import looped


def build(world_size: int, microbatches: int, stages_per_rank: int = 2) -> Schedule:
    """``stages_per_rank`` stages a rank, placed round the ranks."""
    ranks, groups = [], _groups(world_size, microbatches)
    for rank in range(world_size):
        stages = range(rank, world_size * stages_per_rank, world_size)
        forwards = _actions(Kind.FORWARD, stages, groups)
        backwards = _actions(Kind.BACKWARD, stages[::-1], groups)
        ahead = activations(world_size, microbatches, rank, stages_per_rank)
        actions = forwards[:ahead]
        for forward, backward in zip(forwards[ahead:], backwards, strict=False):
            actions += backward, forward
        ranks.append(columns(actions + backwards[len(forwards) - ahead :]))
    return Schedule("interleaved_1f1b", looped(world_size, stages_per_rank), microbatches, tuple(ranks))


def _groups(world_size: int, microbatches: int) -> list[range]:
    """Micro-batches in groups as even as can be, of ``world_size`` or more, the larger first."""
    count = max(1, microbatches // world_size)
    size, more = divmod(microbatches, count)
    stops = [0, *accumulate(size + (group < more) for group in range(count))]
    return [range(first, stop) for first, stop in pairwise(stops)]


def _actions(kind: Kind, stages: range, groups: list[range]) -> list[Action]:
    return [Action(kind, stage, micro) for group in groups for stage in stages for micro in group]


def bubble(world_size: int, microbatches: int, stages_per_rank: int = 2) -> float | None:
    """Idle share of the step, (p-1)/(vm+p-1), when all stages take the same time; None unless p divides m."""
    if microbatches % world_size:
        return None
    return (world_size - 1) / (stages_per_rank * microbatches + world_size - 1)


def activations(world_size: int, microbatches: int, rank: int, stages_per_rank: int = 2) -> int:
    """Most activations of a stage (a v-th of a rank's layers) that ``rank`` holds at once: the forwards
    before its first backward. One group passes all stages but the last; then two for each rank behind it,
    because a forward and a backward take turns, and one of its own."""
    largest = len(_groups(world_size, microbatches)[0])
    ahead = (stages_per_rank - 1) * largest + 2 * (world_size - 1 - rank) + 1
    return min(ahead, microbatches * stages_per_rank)
