"""V-Half: a V that is crossed so quickly that half of 1F1B's activations are in flight (Qi et al. 2024,
"Pipeline Parallelism with Controllable Memory", section 3).

A micro-batch makes six passes on a rank: F, I and W of two stages. All micro-batches make them in the same
rhythm, six units (F = I = W = 1) after one another, so that no two passes of a rank may fall on the same
unit modulo 6. How long an activation is held depends on how many units a pass takes from rank to rank; with
2 and 1 in turn (forward down, forward up, backward down, backward up) the two stages of a rank hold p
together. The rhythm fixes the order of F and I; weight gradients fill what would be idle.
"""

from collections import deque

import numpy as np

from parallel.schedules.actions import Action, Kind, Schedule, columns
from parallel.schedules.v_rank import v_schedule

PERIOD = 6
_LATE = 10**9


def build(world_size: int, microbatches: int) -> Schedule:
    """Two stages a rank: its own number and the mirror image; backwards are split."""
    orders = [_order(rank, world_size, microbatches) for rank in range(world_size)]
    ranks = _fill(orders, 2 * world_size, world_size + 2)
    return v_schedule("v_half", microbatches, ranks)


def _order(rank: int, world_size: int, microbatches: int) -> list[Action]:
    """F and I of ``rank`` by the units at which the rhythm has them. ``turns``: units from a leg's end to the
    next's beginning, the fewest that keep all ranks free of collisions; they depend on the parity of p."""
    last, up = world_size - 1, 2 * world_size - 1 - rank
    turns = (1, 1, 2) if world_size % 2 else (4, 1, 5)
    forward_up = 2 * last + turns[0]
    backward_down = forward_up + last + turns[1]
    backward_up = backward_down + 2 * last + turns[2]
    begin = [
        (2 * rank, Kind.FORWARD, rank),
        (forward_up + last - rank, Kind.FORWARD, up),
        (backward_down + 2 * rank, Kind.INPUT_GRADIENT, up),
        (backward_up + last - rank, Kind.INPUT_GRADIENT, rank),
    ]
    passes = [
        (unit + PERIOD * micro, Action(kind, stage, micro))
        for unit, kind, stage in begin
        for micro in range(microbatches)
    ]
    return [action for _, action in sorted(passes)]


def _fill(orders: list[list[Action]], stages: int, most: int) -> list[np.ndarray]:
    """Columns of each rank: its order, begun as early as it can when every pass takes one unit and at most
    ``most`` activations are held; a weight gradient, the oldest, in each unit that this leaves idle."""
    queues = [deque(order) for order in orders]
    late: list[deque[Action]] = [deque() for _ in orders]
    ranks: list[list[Action]] = [[] for _ in orders]
    held = [0] * len(orders)
    ready: dict[Action, int] = {}  # the unit from which a result is there
    unit = 0
    while any(queues) or any(late):
        for rank, order in enumerate(queues):
            room = held[rank] < most or (order and order[0].kind != Kind.FORWARD)
            if order and room and _ready(order[0], stages, ready) <= unit:
                action = order.popleft()
                held[rank] += action.kind == Kind.FORWARD
                if action.kind == Kind.INPUT_GRADIENT:
                    late[rank].append(action._replace(kind=Kind.WEIGHT_GRADIENT))
            elif late[rank]:
                action = late[rank].popleft()
                held[rank] -= 1
            else:
                continue
            ready[action] = unit + 1
            ranks[rank].append(action)
        unit += 1
    return [columns(actions) for actions in ranks]


def _ready(action: Action, stages: int, ready: dict[Action, int]) -> int:
    """The unit from which ``action`` has what it needs."""
    kind, stage, micro = action
    if kind == Kind.FORWARD:
        return ready.get(Action(kind, stage - 1, micro), _LATE) if stage else 0
    if stage == stages - 1:
        return ready.get(Action(Kind.FORWARD, stage, micro), _LATE)
    return ready.get(Action(kind, stage + 1, micro), _LATE)


def bubble(world_size: int, microbatches: int) -> float | None:
    """Idle share of the step, (3p-5)/(6m+3p-5), when F = I = W on all stages (found by simulation); None for
    p < 3, where half of 1F1B is not to be had, and for m < p."""
    if world_size < 3 or microbatches < world_size:
        return None
    idle = 3 * world_size - 5
    return idle / (6 * microbatches + idle)


def activations(world_size: int, microbatches: int, rank: int) -> int:
    """Most activations of a stage (half of a rank's layers) that ``rank`` holds at once, at most: p+2, where
    the first rank of 1F1B holds as much as 2p."""
    return min(world_size + 2, 2 * microbatches, microbatches + rank + 1)
