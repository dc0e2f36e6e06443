"""Writes down what one rank of a V-shaped schedule does, pass by pass."""

from collections import Counter, deque

import numpy as np

from parallel.schedules.actions import Action, Kind, Schedule, columns
from parallel.schedules.placement import v_shaped


class VRank:
    """The passes of a rank over its two stages: ``down`` is the rank's own number, ``up`` its mirror image.

    Each pass takes the next micro-batch of its stage. Schedules are planned for at least ``planned``
    micro-batches, as many as fill the pipeline; of those that there are not, nothing is written.
    """

    def __init__(self, rank: int, world_size: int, microbatches: int) -> None:
        self.down, self.up, self._microbatches = rank, 2 * world_size - 1 - rank, microbatches
        self._count: Counter[tuple[str, int]] = Counter()
        self._late: deque[Action] = deque()
        self._actions: list[Action] = []

    def forward(self, stage: int) -> None:
        self._write(Action(Kind.FORWARD, stage, self._next("forward", stage)))

    def backward(self, stage: int) -> None:
        """Both halves at once."""
        self._write(Action(Kind.BACKWARD, stage, self._next("backward", stage)))

    def input_gradient(self, stage: int) -> None:
        """The weight gradient is put off."""
        micro = self._next("backward", stage)
        self._write(Action(Kind.INPUT_GRADIENT, stage, micro))
        self._late.append(Action(Kind.WEIGHT_GRADIENT, stage, micro))

    def weight_gradient(self) -> None:
        """The oldest that was put off."""
        self._write(self._late.popleft())

    def finish(self) -> np.ndarray:
        """All that were put off; then the columns of what was written."""
        while self._late:
            self.weight_gradient()
        return columns(self._actions)

    def _next(self, way: str, stage: int) -> int:
        self._count[way, stage] += 1
        return self._count[way, stage] - 1

    def _write(self, action: Action) -> None:
        if action.microbatch < self._microbatches:
            self._actions.append(action)


def v_schedule(name: str, microbatches: int, ranks: list[np.ndarray]) -> Schedule:
    """The schedule of the ranks' columns, two stages each."""
    return Schedule(name, v_shaped(len(ranks)), microbatches, tuple(ranks))
