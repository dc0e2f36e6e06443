"""The columnar table that every reader fills."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.traces.events import Events, Kind, Lane, Trace

WHOLE = st.integers(-(2**40), 2**40)
ROWS = st.lists(st.tuples(WHOLE, st.integers(0, 5), st.integers(0, 3)), max_size=40)


def events(rows, **columns):
    start, duration, lane = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
    zeros = [0] * len(rows)
    return Events.of(start=start, duration=duration, lane=lane, **({"name": zeros, "kind": zeros} | columns))


@given(ROWS)
def test_rows_are_in_order_of_lane_then_start_with_parents_before_their_children(rows):
    table = events(rows, name=range(len(rows)))
    wanted = sorted(range(len(rows)), key=lambda i: (rows[i][2], rows[i][0], -rows[i][1]))
    assert table.name.tolist() == wanted


def test_starts_too_far_apart_for_one_integer_are_sorted_too():
    table = events([(2**62, 1, 1), (-(2**62), 1, 1), (0, 1, 0)])
    assert table.start.tolist() == [0, -(2**62), 2**62]


def test_columns_left_out_are_filled_and_all_have_their_types():
    table = events([(5, 2, 0)])
    assert {name: getattr(table, name).dtype.type for name in Events.DTYPES} == Events.DTYPES
    assert (table.correlation[0], table.shape[0], table.bytes[0], table.group[0]) == (-1, -1, -1, -1)
    assert (table.flops[0], table.calls[0], table.end[0], len(table)) == (0.0, 1, 7, 1)


def test_rows_are_selected_by_mask_and_by_index():
    table = events([(1, 1, 0), (2, 1, 0), (3, 1, 0)])
    assert table.select(table.start > 1).start.tolist() == [2, 3]
    assert table.select(np.array([2, 0])).start.tolist() == [3, 1]


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ({"start": [1], "duration": [1], "name": [0], "kind": [0]}, "left out: lane"),
        (
            {"start": [1], "duration": [1], "name": [0], "kind": [0], "lane": [0], "rank": [0]},
            "no such columns: rank",
        ),
        ({"start": [1, 2], "duration": [1], "name": [0], "kind": [0], "lane": [0]}, "unequal lengths"),
        ({"start": [1], "duration": [-1], "name": [0], "kind": [0], "lane": [0]}, "negative"),
    ],
)
def test_columns_that_make_no_table_are_refused(columns, what):
    with pytest.raises(ValueError, match=what):
        Events.of(**columns)


def test_a_slice_is_on_a_device_where_its_lane_is():
    table = events([(1, 1, 0), (1, 1, 1)], kind=[Kind.COMMUNICATION, Kind.COMMUNICATION])
    trace = Trace(
        "a.json", "kineto", table, ["x"], [Lane("python", "thread 1"), Lane("GPU 0", "stream 7", 0)]
    )
    assert trace.on_device().tolist() == [False, True]
    assert not Trace("a.json", "kineto", events([]), [], []).on_device().any()
