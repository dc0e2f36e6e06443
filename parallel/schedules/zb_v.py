"""ZB-V: two stages a rank in the shape of a V, weight gradients in the gaps, no bubble but at the start
(Qi et al. 2023, "Zero Bubble Pipeline Parallelism"; Qi et al. 2024, "Pipeline Parallelism with Controllable
Memory", section 3: V-ZB).

The last stage lies on the first rank, so that the rank which waits longest in 1F1B for its first gradient
gets it first. Activations are at most those of 1F1B's first rank, and the same on every rank.
"""

import numpy as np

from parallel.schedules.actions import Schedule
from parallel.schedules.v_rank import VRank, v_schedule


def build(world_size: int, microbatches: int) -> Schedule:
    """Two stages a rank: its own number and the mirror image."""
    ranks = [_rank(rank, world_size, microbatches) for rank in range(world_size)]
    return v_schedule("zb_v", microbatches, ranks)


def _rank(rank: int, world_size: int, microbatches: int) -> np.ndarray:
    do = VRank(rank, world_size, microbatches)
    behind = world_size - rank
    planned = max(microbatches, 2 * world_size - 1)
    for _ in range(2 * behind - 1):
        do.forward(do.down)
    for _ in range(rank):
        do.forward(do.up)
        do.forward(do.down)
    for _ in range(behind):
        do.forward(do.up)
        do.input_gradient(do.up)
        do.weight_gradient()
    forwards = 2 * behind - 1 + rank
    for micro in range(planned - world_size):
        if forwards + micro < planned:
            do.forward(do.down)
        do.input_gradient(do.down)
        do.weight_gradient()
        do.forward(do.up)
        do.input_gradient(do.up)
        do.weight_gradient()
    for _ in range(rank):
        do.input_gradient(do.down)
        do.input_gradient(do.up)
    for _ in range(behind):
        do.input_gradient(do.down)
        do.weight_gradient()
    return do.finish()


def bubble(world_size: int, microbatches: int) -> float | None:
    """Idle share of the step, (p-1)/(6m+p-1), when F = I = W on all stages; None for m < 2p-1."""
    if microbatches < 2 * world_size - 1:
        return None
    return (world_size - 1) / (6 * microbatches + world_size - 1)


def activations(world_size: int, microbatches: int, rank: int) -> int:
    """Most activations of a stage (half of a rank's layers) that ``rank`` holds at once: 2p, if
    there are micro-batches enough."""
    return min(2 * world_size, 2 * microbatches, microbatches + rank + 1)
