"""What is wrong with a schedule is named: rank, position, action."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_schedules import meets

from parallel import schedules

GOOD = """name mine
placement 0 1
0: 0F0 0F1 0B0 0B1
1: 1F0 1B0 1F1 1B1
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0F1 ", "", "mine: stage 0 (rank 0), micro-batch 1: F is missing"),
        ("1F1 1B1", "1F1", "mine: stage 1 (rank 1), micro-batch 1: no backward: neither B, nor I and W"),
        ("1B1", "1I1", "mine: stage 1 (rank 1), micro-batch 1: W is missing, the other half of I"),
        ("1B1", "1W1", "mine: stage 1 (rank 1), micro-batch 1: I is missing, the other half of W"),
        (
            "1B1",
            "1B1 1W1",
            "mine: stage 1 (rank 1), micro-batch 1: there is a full backward B and a half of it",
        ),
        ("0F0 0F1", "0F0 0F1 0F0", "mine: rank 0, position 0: 0F0 comes twice"),
        (
            "1F0 1B0",
            "1B0 1F0",
            "mine: rank 1, position 0: 1B0 comes before what it needs: rank 1, position 1: 1F0",
        ),
        (
            "1B0",
            "1W0 1I0",
            "mine: rank 1, position 1: 1W0 comes before what it needs: rank 1, position 2: 1I0",
        ),
        ("1F1", "0F1", "mine: rank 1, position 2: 0F1: stage 0 lies on rank 0"),
        ("1F1", "2F1", "mine: rank 1, position 2: 2F1: there are stages 0 to 1"),
        ("placement 0 1", "placement 0 2", "mine: stage 1 is placed on rank 2 of 2"),
        ("placement 0 1", "placement 0 0", "mine: rank 1 holds no stage"),
        (
            "0B0 0B1\n1: 1F0 1B0 1F1 1B1",
            "0B1 0B0\n1: 1F0 1F1 1B0 1B1",
            None,  # backwards may come in any order
        ),
        (
            "0F0 0F1 0B0 0B1\n1: 1F0 1B0",
            "0F0 0B1 0F1 0B0\n1: 1F0 1B0",
            "mine: rank 0, position 1: 0B1 comes before what it needs: rank 0, position 2: 0F1",
        ),
        (
            "0F0 0F1 0B0 0B1\n1: 1F0 1B0 1F1 1B1",
            "0F0 0B0 0F1 0B1\n1: 1F1 1B1 1F0 1B0",
            "mine: rank 0, position 1: 0B0 waits for ever, for rank 1, position 3: 1B0",
        ),
    ],
)
def test_what_is_wrong_is_named(old, new, message):
    assert old in GOOD
    schedule = schedules.parse(GOOD.replace(old, new))
    if message is None:
        schedules.validate(schedule)
        return
    with pytest.raises(ValueError) as raised:
        schedules.validate(schedule)
    assert str(raised.value).startswith(message)


COMPLETE = """name mine
placement 0 1
0: 0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1
1: 1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1B1 1SEND_B1
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0SEND_F1 ", "", "mine: rank 0: 0SEND_F1 is missing"),
        ("0RECV_B1 ", "", "mine: rank 0: 0RECV_B1 is missing"),
        ("0B1", "0B1 0SEND_B1", "mine: rank 0: 0SEND_B1 has no other end"),
        ("0F0 0SEND_F0", "0RECV_F0 0F0 0SEND_F0", "mine: rank 0: 0RECV_F0 has no other end"),
        ("1F1 1B1", "1F1 1RECV_B1 1B1", "mine: rank 1: 1RECV_B1 has no other end"),
        ("0F1 0SEND_F1", "0SEND_F1 0F1", "mine: rank 0, position 2: 0SEND_F1 comes before what it sends"),
        (
            "0RECV_B0 0B0",
            "0B0 0RECV_B0",
            "mine: rank 0, position 4: 0B0 comes before what it needs is received",
        ),
        ("1RECV_F1 ", "1RECV_F1 1RECV_F1 ", "mine: rank 1, position 2: 1RECV_F1 comes twice"),
        (
            "1F1 1B1 1SEND_B1",
            "1B1 1SEND_B1 1F1",
            "mine: rank 1, position 5: 1B1 comes before what it needs: rank 1, position 7: 1F1",
        ),
        (
            "0SEND_F1 0RECV_B0 0B0",
            "0RECV_B0 0SEND_F1 0B0",
            "mine: deadlock: ranks wait at rank 0, position 3: 0RECV_B0; rank 1, position 2: 1RECV_F1. "
            "The first waits for rank 1, position 4: 1SEND_B0",
        ),
    ],
)
def test_what_is_wrong_with_messages_is_named(old, new, message):
    schedules.validate(schedules.parse(COMPLETE))
    assert old in COMPLETE
    with pytest.raises(ValueError) as raised:
        schedules.validate(schedules.parse(COMPLETE.replace(old, new)))
    assert str(raised.value).startswith(message)


@settings(max_examples=200)
@given(st.data(), st.sampled_from(schedules.NAMES), st.integers(2, 4), st.integers(1, 5))
def test_of_schedules_with_two_neighbours_swapped_those_pass_that_come_to_an_end(data, name, p, m):
    """Every rank still does the same, in another order: the rest is whether it can happen, which the plain
    execution tells, and whether each rank has what it needs, which is known of the two."""
    schedule = schedules.with_communication(schedules.build(name, p, m))
    rank = data.draw(st.integers(0, p - 1))
    actions = schedule.ranks[rank].copy()
    place = data.draw(st.integers(0, len(actions) - 2))
    first, second = schedule.actions(rank)[place : place + 2]
    actions[[place, place + 1]] = actions[[place + 1, place]]
    ranks = (*schedule.ranks[:rank], actions, *schedule.ranks[rank + 1 :])
    depends = first.microbatch == second.microbatch and needs(schedule, first, second)
    swapped = replace(schedule, ranks=ranks)
    if meets(swapped) and not depends:
        schedules.validate(swapped)
    else:
        with pytest.raises(ValueError, match=r"before what it|deadlock"):
            schedules.validate(swapped)


def needs(schedule, first, second):
    """Whether ``second`` uses what its neighbour ``first`` of the same micro-batch leaves on the rank."""
    kind = schedules.Kind
    back = (kind.BACKWARD, kind.INPUT_GRADIENT)
    if first.kind == kind.RECEIVE_FORWARD:
        return second.kind == kind.FORWARD and second.stage == first.stage
    if first.kind == kind.RECEIVE_BACKWARD:
        return second.kind in back and second.stage == first.stage
    if first.kind == kind.FORWARD:
        after = second.stage == first.stage + 1 and second.kind == kind.FORWARD
        return after or (second.stage == first.stage and second.kind in (*back, kind.SEND_FORWARD))
    if first.kind in back:
        before = second.stage == first.stage - 1 and second.kind in back
        same = second.kind in (kind.WEIGHT_GRADIENT, kind.SEND_BACKWARD)
        return before or (second.stage == first.stage and same)
    return False


@pytest.mark.parametrize("name", schedules.NAMES)
def test_any_action_that_is_left_out_or_doubled_is_missed(name):
    schedule = schedules.with_communication(schedules.build(name, 2, 2))
    for rank, actions in enumerate(schedule.ranks):
        for place in range(len(actions)):
            for count in (0, 2):
                rows = [*actions[:place], *[actions[place]] * count, *actions[place + 1 :]]
                table = schedules.columns(map(tuple, rows))
                ranks = (*schedule.ranks[:rank], table, *schedule.ranks[rank + 1 :])
                with pytest.raises(ValueError, match=r"missing|twice|no backward|no other end"):
                    schedules.validate(replace(schedule, ranks=ranks))


def test_stages_of_one_rank_in_the_wrong_order_are_named():
    wrong = """placement 0 0 1
    0: 1F0 1SEND_F0 0F0 1RECV_B0 1B0 0B0
    1: 2RECV_F0 2F0 2B0 2SEND_B0"""
    with pytest.raises(ValueError, match=r"wait at rank 0, position 0: 1F0; .* for rank 0, position 2: 0F0$"):
        schedules.validate(schedules.parse(wrong))


def test_a_number_of_microbatches_that_no_table_holds_is_an_error():
    with pytest.raises(
        ValueError, match="2 actions are too few for 2000000001 micro-batches through 1 stages"
    ):
        schedules.validate(schedules.parse("placement 0\n0: 0F2000000000 0B2000000000"))


def test_no_microbatches_are_no_schedule():
    with pytest.raises(ValueError, match="at least one micro-batch"):
        schedules.validate(schedules.parse("placement 0\n0:"))
