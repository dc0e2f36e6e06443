"""DualPipe-V: DualPipe (DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 3.2.1) cut in half into a V
(Qi et al. 2025, "DualPipe could be better without the Dual", Sea AI Lab).

In the steady state a forward of one of the rank's two stages stands beside a full backward of the other, so
that the one's communication hides behind the other's computing; only the ends split the backward. Where the
two run as one, their results come late and the bubble is twice ZB-V's (``simulate(side_by_side=True)``); one
after the other, as ``parallel.pipeline`` runs them, it is ZB-V's, with fewer split backwards.
"""

import numpy as np

from parallel.schedules.actions import Schedule
from parallel.schedules.v_rank import VRank, v_schedule


def build(world_size: int, microbatches: int) -> Schedule:
    """Two stages a rank: its own number and the mirror image."""
    ranks = [_rank(rank, world_size, microbatches) for rank in range(world_size)]
    return v_schedule("dualpipe_v", microbatches, ranks)


def _rank(rank: int, world_size: int, microbatches: int) -> np.ndarray:
    do = VRank(rank, world_size, microbatches)
    after = world_size - rank - 1
    planned = max(microbatches, 2 * world_size)
    for _ in range(2 * after):
        do.forward(do.down)
    for _ in range(rank + 1):
        do.forward(do.down)
        do.forward(do.up)
    for _ in range(after):
        do.input_gradient(do.up)
        do.weight_gradient()
        do.forward(do.up)
    for _ in range(planned - 2 * world_size + rank + 1):
        do.forward(do.down)
        do.backward(do.up)
        do.forward(do.up)
        do.backward(do.down)
    for _ in range(after):
        do.backward(do.up)
        do.forward(do.up)
        do.backward(do.down)
    _drain(do, rank + 1)
    for _ in range(after):
        do.weight_gradient()
        do.input_gradient(do.down)
    return do.finish()


def _drain(do: VRank, pairs: int) -> None:
    """Backwards of both stages in turn; from the middle on they are split, so that the ranks before this one
    wait only for input gradients."""
    for number in range(2 * pairs):
        stage = do.down if number % 2 else do.up
        if number < pairs:
            do.backward(stage)
        else:
            do.input_gradient(stage)


def bubble(world_size: int, microbatches: int) -> float | None:
    """Idle share of the step, (p-1)/(6m+p-1), when F = I = W on all stages and pairs run in turn; None for
    m < 2p."""
    return _bubble(world_size - 1, world_size, microbatches)


def bubble_side_by_side(world_size: int, microbatches: int) -> float | None:
    """The same where pairs run as one, as published: 2(p-1)/(6m+2(p-1))."""
    return _bubble(2 * (world_size - 1), world_size, microbatches)


def _bubble(idle: int, world_size: int, microbatches: int) -> float | None:
    return idle / (6 * microbatches + idle) if microbatches >= 2 * world_size else None


def activations(world_size: int, microbatches: int, rank: int) -> int:
    """Most activations of a stage (half of a rank's layers) that ``rank`` holds at once: 2p+1, if there are
    micro-batches enough."""
    return min(2 * world_size + 1, 2 * microbatches, microbatches + rank + 1)
