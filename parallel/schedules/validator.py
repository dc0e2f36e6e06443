"""Whether a schedule can be executed: nothing missing, nothing twice, in an order that can happen."""

from __future__ import annotations

import numpy as np

from parallel.schedules.actions import COMPUTING, Action, Kind, Schedule
from parallel.schedules.communication import with_communication
from parallel.schedules.flat import Flat, flatten, needs

FORWARD, BACKWARD, INPUT, WEIGHT = COMPUTING
_PARTNERS = {Kind.SEND_FORWARD: (Kind.RECEIVE_FORWARD, 1), Kind.SEND_BACKWARD: (Kind.RECEIVE_BACKWARD, -1)}


def validate(schedule: Schedule) -> None:
    """ValueError that says what is wrong with ``schedule`` first: rank, position, action, and why.

    Every stage has a rank that there is and every rank a stage; every micro-batch goes through each stage
    once, forward and back (at once, or input gradient and then weight gradient). With communication: each
    result that another rank needs is sent once, after it was computed, and received once, before it is used;
    and it all comes to an end even if a send or receive returns only when its partner has met it. Without:
    computing alone comes to an end.
    """
    _check_placement(schedule)
    for rank, actions in enumerate(schedule.ranks):
        _check_ranges(schedule, rank, actions)
    flat = flatten(schedule)
    _check_once(flat)
    _check_order(flat)
    if np.isin(flat.kind, COMPUTING).all():
        with_communication(schedule)  # which raises if it cannot come to an end
    else:
        _check_messages(flat)


def _check_placement(schedule: Schedule) -> None:
    if not schedule.world_size or not schedule.stages:
        raise ValueError(f"{schedule.name}: a schedule needs at least one rank and one stage")
    if schedule.microbatches < 1:
        raise ValueError(f"{schedule.name}: a schedule needs at least one micro-batch")
    actions = sum(map(len, schedule.ranks))
    if schedule.microbatches * schedule.stages > actions:  # before there are tables of that size
        raise ValueError(
            f"{schedule.name}: {actions} actions are too few for {schedule.microbatches} micro-batches "
            f"through {schedule.stages} stages"
        )
    for stage, rank in enumerate(schedule.placement):
        if not 0 <= rank < schedule.world_size:
            raise ValueError(
                f"{schedule.name}: stage {stage} is placed on rank {rank} of {schedule.world_size}"
            )
    if idle := set(range(schedule.world_size)) - set(schedule.placement):
        raise ValueError(f"{schedule.name}: rank {min(idle)} holds no stage")


def _check_ranges(schedule: Schedule, rank: int, actions: np.ndarray) -> None:
    kind, stage, micro = actions.T
    inside = (kind >= 0) & (kind < len(Kind)) & (stage >= 0) & (stage < schedule.stages)
    here = np.zeros(len(actions), bool)
    here[inside] = np.asarray(schedule.placement)[stage[inside]] == rank
    wrong = np.flatnonzero(~here | (micro < 0) | (micro >= schedule.microbatches))
    if not len(wrong):
        return
    position = int(wrong[0])
    if not 0 <= kind[position] < len(Kind):
        raise ValueError(
            f"{schedule.name}: rank {rank}, position {position}: there is no kind {kind[position]}"
        )
    action = Action(Kind(kind[position]), int(stage[position]), int(micro[position]))
    where = f"{schedule.name}: rank {rank}, position {position}: {action}: "
    if not 0 <= action.stage < schedule.stages:
        raise ValueError(where + f"there are stages 0 to {schedule.stages - 1}")
    if not here[position]:
        raise ValueError(where + f"stage {action.stage} lies on rank {schedule.placement[action.stage]}")
    raise ValueError(where + f"there are micro-batches 0 to {schedule.microbatches - 1}")


def _rows(flat: Flat, kind: Kind) -> np.ndarray:
    """(stages, micro-batches) rows of the actions of ``kind``, -1 where there is none; ValueError for two."""
    rows = np.full((flat.schedule.stages, flat.schedule.microbatches), -1, np.int64)
    chosen = np.flatnonzero(flat.kind == kind)
    rows[flat.stage[chosen], flat.microbatch[chosen]] = chosen
    twice = np.flatnonzero(rows[flat.stage[chosen], flat.microbatch[chosen]] != chosen)
    if len(twice):
        first = int(chosen[twice[0]])
        raise ValueError(f"{flat.schedule.name}: {flat.where(first)} comes twice")
    return rows


def _check_once(flat: Flat) -> None:
    forward, backward, halves, weights = (_rows(flat, kind) >= 0 for kind in COMPUTING)
    name = flat.schedule.name
    for wrong, what in (
        (~forward, "F is missing"),
        (backward & (halves | weights), "there is a full backward B and a half of it, I or W"),
        (~backward & ~halves & ~weights, "no backward: neither B, nor I and W"),
        (halves & ~weights, "W is missing, the other half of I"),
        (weights & ~halves, "I is missing, the other half of W"),
    ):
        if wrong.any():
            stage, micro = map(int, np.argwhere(wrong)[0])
            raise ValueError(
                f"{name}: stage {stage} (rank {flat.schedule.placement[stage]}), micro-batch {micro}: {what}"
            )


def _check_order(flat: Flat) -> None:
    """F before its backward, I before W; rows of one rank are in order."""
    back = np.flatnonzero((flat.kind == BACKWARD) | (flat.kind == INPUT))
    weight = np.flatnonzero(flat.kind == WEIGHT)
    for rows, lookup in ((back, flat.forwards), (weight, flat.backwards)):
        before = lookup[flat.stage[rows], flat.microbatch[rows]]
        early = np.flatnonzero(before > rows)
        if len(early):
            row, other = int(rows[early[0]]), int(before[early[0]])
            raise ValueError(
                f"{flat.schedule.name}: {flat.where(row)} comes before what it needs: {flat.where(other)}"
            )


def _check_messages(flat: Flat) -> None:
    """All that is needed is sent and received, once; and it comes to an end."""
    from parallel.schedules.event_loop import meet

    name, placement, stages = flat.schedule.name, flat.schedule.placement, range(flat.schedule.stages)
    need = needs(flat)
    partner = np.full(len(need), -1, np.int64)
    for send, (receive, step) in _PARTNERS.items():
        sends, receives = _rows(flat, send), _rows(flat, receive)
        computed = flat.forwards if send == Kind.SEND_FORWARD else flat.backwards
        for stage in range(-1, len(stages) + 1):  # also from nowhere to the first stage, and from the last
            to = stage + step
            crosses = stage in stages and to in stages and placement[to] != placement[stage]
            for rows, at, kind in ((sends, stage, send), (receives, to, receive)):
                wrong = np.flatnonzero((rows[at] >= 0) != crosses) if at in stages else np.empty(0)
                if len(wrong):
                    action = Action(kind, at, int(wrong[0]))
                    why = "is missing" if crosses else "has no other end"
                    raise ValueError(f"{name}: rank {placement[at]}: {action} {why}")
            if crosses:
                partner[sends[stage]], partner[receives[to]] = receives[to], sends[stage]
                _check_before(flat, computed[stage], sends[stage], "comes before what it sends")
                _check_before(flat, receives[to], computed[to], "comes before what it needs is received")
                need[computed[to]] = -1
    reached = meet(flat.first, need, partner, flat.rank)
    stuck = np.flatnonzero(reached < flat.first[1:])
    if len(stuck):
        waits = [flat.where(int(reached[rank])) for rank in stuck[:4]]
        row = int(reached[stuck[0]])
        other = flat.where(int(partner[row] if partner[row] >= 0 else need[row]))
        raise ValueError(f"{name}: deadlock: ranks wait at {'; '.join(waits)}. The first waits for {other}")


def _check_before(flat: Flat, first: np.ndarray, second: np.ndarray, what: str) -> None:
    wrong = np.flatnonzero(first > second)
    if len(wrong):
        one, other = flat.where(int(second[wrong[0]])), flat.where(int(first[wrong[0]]))
        raise ValueError(f"{flat.schedule.name}: {one} {what}: {other}")
