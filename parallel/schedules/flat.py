"""All actions of a schedule in one table, and which action needs which."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from parallel.schedules.actions import Action, Kind, Schedule

FORWARD, BACKWARD, INPUT, WEIGHT = Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT


@dataclass(frozen=True, eq=False)
class Flat:
    """Columns over all actions, rank after rank in order. first: where each rank begins, and the end.

    The lookups give the row of an action by its (stage, micro-batch), or -1: ``backwards`` of full backwards
    and of input gradients, which both produce what the stage before waits for.
    """

    schedule: Schedule
    first: np.ndarray
    rank: np.ndarray
    kind: np.ndarray
    stage: np.ndarray
    microbatch: np.ndarray
    forwards: np.ndarray
    backwards: np.ndarray

    def where(self, row: int) -> str:
        """``rank 1, position 3: 2F0``, for messages."""
        rank = int(self.rank[row])
        position = row - int(self.first[rank])
        action = Action(Kind(self.kind[row]), int(self.stage[row]), int(self.microbatch[row]))
        return f"rank {rank}, position {position}: {action}"


def flatten(schedule: Schedule) -> Flat:
    """The table of ``schedule``, whose stages and micro-batches must lie in their ranges."""
    lengths = [len(actions) for actions in schedule.ranks]
    first = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    kind, stage, microbatch = np.concatenate(schedule.ranks).T.copy()
    lookups = []
    for kinds in ((FORWARD,), (BACKWARD, INPUT)):
        rows = np.full((schedule.stages, schedule.microbatches), -1, np.int64)
        chosen = np.flatnonzero(np.isin(kind, kinds))
        rows[stage[chosen], microbatch[chosen]] = chosen
        lookups.append(rows)
    rank = np.repeat(np.arange(schedule.world_size, dtype=np.int32), lengths)
    return Flat(schedule, first, rank, kind, stage, microbatch, *lookups)


def needs(flat: Flat) -> np.ndarray:
    """The row that each computing action waits for: a forward for that of the stage before, a backward for
    that of the stage behind (on the last stage: its forward), a weight gradient for its input gradient.
    -1: nothing, or not there."""
    need = np.full(len(flat.kind), -1, np.int64)
    last = flat.schedule.stages - 1

    def fill(rows: np.ndarray, lookup: np.ndarray, offset: int) -> None:
        need[rows] = lookup[flat.stage[rows] + offset, flat.microbatch[rows]]

    backward = (flat.kind == BACKWARD) | (flat.kind == INPUT)
    fill(np.flatnonzero((flat.kind == FORWARD) & (flat.stage > 0)), flat.forwards, -1)
    fill(np.flatnonzero(backward & (flat.stage < last)), flat.backwards, 1)
    fill(np.flatnonzero(backward & (flat.stage == last)), flat.forwards, 0)
    fill(np.flatnonzero(flat.kind == WEIGHT), flat.backwards, 0)
    return need
