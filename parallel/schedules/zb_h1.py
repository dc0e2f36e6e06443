"""ZB-H1: 1F1B whose weight gradients wait until the rank would be idle (Qi et al. 2023, "Zero Bubble Pipeline
Parallelism", section 2.1.1).

Nothing waits for a weight gradient but the optimizer, so only the input gradient is computed on the way back.
Rank r puts off r weight gradients; what it saves in the steady state fills its bubble at the end. The
activations held are at most 1F1B's first rank's, on every rank.
"""

from parallel.schedules.actions import Action, Kind, Schedule, columns
from parallel.schedules.placement import looped


def build(world_size: int, microbatches: int) -> Schedule:
    """One stage a rank; full backwards are split."""
    ranks = [_rank(rank, world_size, microbatches) for rank in range(world_size)]
    return Schedule("zb_h1", looped(world_size), microbatches, tuple(columns(actions) for actions in ranks))


def _rank(rank: int, world_size: int, microbatches: int) -> list[Action]:
    ahead = min(world_size - rank, microbatches)
    actions = [Action(Kind.FORWARD, rank, micro) for micro in range(ahead)]
    for micro in range(microbatches):
        actions.append(Action(Kind.INPUT_GRADIENT, rank, micro))
        if micro >= rank:
            actions.append(Action(Kind.WEIGHT_GRADIENT, rank, micro - rank))
        if micro + ahead < microbatches:
            actions.append(Action(Kind.FORWARD, rank, micro + ahead))
    late = range(max(0, microbatches - rank), microbatches)
    return actions + [Action(Kind.WEIGHT_GRADIENT, rank, micro) for micro in late]


def bubble(world_size: int, microbatches: int) -> float | None:
    """Idle share of the step, (p-1)/(3m+p-1), when F = I = W on all stages; None for m < p."""
    if microbatches < world_size:
        return None
    return (world_size - 1) / (3 * microbatches + world_size - 1)


def activations(world_size: int, microbatches: int, rank: int) -> int:
    """Most activations of a stage that ``rank`` holds at once, counted until the weight gradient."""
    return min(world_size, microbatches)
