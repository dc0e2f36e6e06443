"""Schedules are read from text, and what is wrong with the text is named with its line."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel import schedules


@settings(max_examples=40)
@given(st.sampled_from(schedules.NAMES), st.integers(1, 5), st.integers(1, 6), st.booleans())
def test_what_is_printed_is_read_back(name, p, m, communicating):
    schedule = schedules.build(name, p, m)
    if communicating:
        schedule = schedules.with_communication(schedule)
    again = schedules.parse(schedules.to_text(schedule))
    assert (again.name, again.placement, again.microbatches) == (name, schedule.placement, m)
    assert [again.actions(rank) for rank in range(p)] == [schedule.actions(rank) for rank in range(p)]


def test_comments_empty_lines_and_any_order_of_ranks(tmp_path):
    text = "# mine\n\nplacement 0 1   # one each\n1: 1F0 1B0\n0: 0F0 0B0\nname by hand\n"
    file = tmp_path / "mine.txt"
    file.write_text(text)
    schedule = schedules.load(file)
    assert schedules.to_text(schedule) == "name by hand\nplacement 0 1\n0: 0F0 0B0\n1: 1F0 1B0\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "placement 0\n0: 0F0 0X0",
            "line 2: '0X0' is no action: stage, one of F B I W SEND_F RECV_F SEND_B RECV_B",
        ),
        ("placement 0\n0: 0F", "line 2: '0F' is no action"),
        ("placement 0\n0: 0F99999999999", "line 2: '0F99999999999': a stage or micro-batch is below"),
        ("placement 0\n0: 0F0\n0: 0B0", "line 3: rank 0 has a line already"),
        ("placement 0\nplacement 1", "line 2: there is a placement already"),
        ("placement a b", "line 1: a placement names the rank of each stage"),
        ("plaecment 0", "line 1: 'plaecment 0' is neither"),
        ("0: 0F0 0B0", "there is no placement"),
        ("placement 0 1\n1: 1F0", "rank 0 has no line"),
        ("placement 0 1\n0: 0F0 0B0", "stage 1 is placed on rank 1 of 1"),
    ],
)
def test_what_is_wrong_with_a_text_is_named(text, message, tmp_path):
    file = tmp_path / "wrong.txt"
    file.write_text(text)
    with pytest.raises(ValueError) as raised:
        schedules.load(file)
    assert str(raised.value).startswith(f"{file}: ")
    assert message in str(raised.value)


def test_a_file_that_is_no_text_is_named(tmp_path):
    file = tmp_path / "wrong.txt"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"wrong\.txt: a schedule is text"):
        schedules.load(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,,0B0\n0F1,0B1", "line 2: 0F1: stage 0 is on rank 0 already"),
        ("0F0,,0B0\n2F0,2B0", "stages are numbered from 0 without gaps; there are \\[0, 2\\]"),
        ("0SHARD,0F0,0B0", "line 1: '0SHARD' is no action"),
    ],
)
def test_what_is_wrong_with_pytorchs_form_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        schedules.parse_csv(text)


def test_of_pytorchs_form_pairs_stand_in_turn_and_what_is_no_pipeline_is_left_out():
    schedule = schedules.parse_csv("0UNSHARD,0F0,1F0,,(0F1;1B0)OVERLAP_F_B,0B0,1F1,1B1,0B1,0REDUCE_GRAD")
    assert " ".join(map(str, schedule.actions(0))) == "0F0 1F0 0F1 1B0 0B0 1F1 1B1 0B1"
