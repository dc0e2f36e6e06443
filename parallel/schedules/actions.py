"""A pipeline schedule as plain data: what each rank does, in order.

A *stage* is a part of the model; ``placement[stage]`` is the rank that holds it (one rank may hold several).
A micro-batch goes forward through stages 0 to S-1, then its gradient backward. The actions:

    2F5          stage 2, micro-batch 5: forward
    2B5          full backward: the gradients of input and weights
    2I5, 2W5     the two halves of it apart, which zero-bubble schedules move freely (Qi et al. 2023,
                 "Zero Bubble Pipeline Parallelism", section 2: B and W there)
    2SEND_F5     send the output of 2F5 to the rank of stage 3;      3RECV_F5 receives it there
    2SEND_B5     send the input gradient of stage 2 to stage 1;      1RECV_B5 receives it there

The stage of a communication is the one at whose rank it happens. Schedules are written with computing
actions only; ``with_communication`` adds the rest. Between stages of the same rank nothing is sent.

The text form has a line a rank, and lines of settings before them; ``#`` starts a comment:

    name 1f1b
    placement 0 1
    0: 0F0 0F1 0B0 0B1
    1: 1F0 1B0 1F1 1B1
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np


class Kind(IntEnum):
    """What an action does; the order of the names is no order of time."""

    FORWARD = 0
    BACKWARD = 1
    INPUT_GRADIENT = 2
    WEIGHT_GRADIENT = 3
    SEND_FORWARD = 4
    RECEIVE_FORWARD = 5
    SEND_BACKWARD = 6
    RECEIVE_BACKWARD = 7


SYMBOLS = ("F", "B", "I", "W", "SEND_F", "RECV_F", "SEND_B", "RECV_B")
"""Text of each Kind."""
COMPUTING = (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT)


class Action(NamedTuple):
    """One thing that a rank does."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{SYMBOLS[self.kind]}{self.microbatch}"


@dataclass(frozen=True, eq=False)
class Schedule:
    """What each rank does in order, as columns.

    name: of the algorithm. placement: rank of each stage. microbatches: how many there are.
    ranks: a (actions, 3) int32 array a rank, of kind, stage and micro-batch.
    """

    name: str
    placement: tuple[int, ...]
    microbatches: int
    ranks: tuple[np.ndarray, ...]

    @property
    def stages(self) -> int:
        return len(self.placement)

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    def actions(self, rank: int) -> list[Action]:
        """The actions of ``rank`` in order."""
        return [Action(Kind(kind), stage, micro) for kind, stage, micro in self.ranks[rank].tolist()]

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that ``rank`` holds."""
        return tuple(stage for stage, holder in enumerate(self.placement) if holder == rank)


def columns(actions: Iterable[Action]) -> np.ndarray:
    """Actions as the (actions, 3) int32 array that a Schedule holds."""
    return np.array([tuple(action) for action in actions], np.int32).reshape(-1, 3)
