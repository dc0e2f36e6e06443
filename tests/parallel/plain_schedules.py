"""Schedules executed in the plainest way, to hold the validator and the simulator against."""

from parallel.schedules import Action, Kind, Link, Schedule

BACKWARDS = (Kind.BACKWARD, Kind.INPUT_GRADIENT)


def needed(schedule, action):
    """The possible actions whose result ``action`` needs; none for the first stage's forward."""
    kind, stage, micro = action
    if kind == Kind.FORWARD:
        return [Action(kind, stage - 1, micro)] if stage else []
    if kind == Kind.WEIGHT_GRADIENT:
        return [Action(Kind.INPUT_GRADIENT, stage, micro)]
    if stage == schedule.stages - 1:
        return [Action(Kind.FORWARD, stage, micro)]
    return [Action(backward, stage + 1, micro) for backward in BACKWARDS]


def partner(action):
    kind, stage, micro = action
    other = {
        Kind.SEND_FORWARD: (Kind.RECEIVE_FORWARD, stage + 1),
        Kind.RECEIVE_FORWARD: (Kind.SEND_FORWARD, stage - 1),
        Kind.SEND_BACKWARD: (Kind.RECEIVE_BACKWARD, stage - 1),
        Kind.RECEIVE_BACKWARD: (Kind.SEND_BACKWARD, stage + 1),
    }
    return Action(*other[kind], micro) if kind in other else None


def meets(schedule: Schedule) -> bool:
    """Whether every rank comes to its end if a send and its receive happen only when both ranks are there."""
    left = [schedule.actions(rank) for rank in range(schedule.world_size)]
    went_on = True
    while went_on:
        went_on = False
        for actions in left:
            if actions and partner(actions[0]) is None:
                actions.pop(0)
                went_on = True
            elif actions:
                for others in left:
                    if others and others[0] == partner(actions[0]):
                        actions.pop(0)
                        others.pop(0)
                        went_on = True
                        break
    return not any(left)


def end_times(schedule, durations, link=None, overhead=0.0):
    """{action: (start, end)} of a schedule of computing actions."""
    link = link or Link()
    table, seconds = durations.table(schedule.stages), link.seconds(schedule.stages)
    left = [schedule.actions(rank) for rank in range(schedule.world_size)]
    free, sending = [0.0] * len(left), [0.0] * len(left)
    times, arrived = {}, {}
    sent = {
        need
        for actions in left
        for action in actions
        for need in needed(schedule, action)
        if schedule.placement[need.stage] != schedule.placement[action.stage]
    }
    while any(left):
        before = sum(map(len, left))
        for rank, actions in enumerate(left):
            while actions:
                action = actions[0]
                needs = needed(schedule, action)
                source = next((need for need in needs if need in times), None)
                if needs and source is None:
                    break
                begin = free[rank] + overhead
                if source and schedule.placement[source.stage] != rank:
                    begin = max(begin + link.handling, arrived[source] + link.handling)
                end = begin + float(table[action.kind, action.stage])
                times[actions.pop(0)] = begin, end
                free[rank] = end
                if action in sent:
                    free[rank] += link.handling
                    boundary = action.stage if action.kind == Kind.FORWARD else action.stage - 1
                    sending[rank] = max(sending[rank], free[rank]) + float(seconds[boundary])
                    arrived[action] = sending[rank]
        if sum(map(len, left)) == before:
            raise AssertionError(f"stuck at {[str(actions[0]) for actions in left if actions]}")
    return times
