"""Which slice encloses which: against a search through all earlier rows, on sound and on broken lanes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.traces import tree
from bench.traces.events import Events, Kind


def events(*rows):
    """Rows of (lane, start, duration)."""
    table = np.array(rows, np.int64).reshape(-1, 3)
    zeros = np.zeros(len(table), np.int64)
    return Events.of(lane=table[:, 0], start=table[:, 1], duration=table[:, 2], name=zeros, kind=zeros)


def searched(table):
    """The oracle: the nearest earlier row of the lane in which this row lies, but for rounding."""
    start, end = table.start.tolist(), np.maximum(table.end, table.start + 1).tolist()
    found = []
    for row in range(len(table)):
        sticks_out = [
            max(0, end[row] - end[other]) if table.lane[other] == table.lane[row] else np.inf
            for other in range(row)
        ]
        encloses = [
            out <= tree.ROUNDING_NS and end[other] - start[row] >= out for other, out in enumerate(sticks_out)
        ]
        found.append(max((other for other in range(row) if encloses[other]), default=-1))
    return found


# Lengths around the tolerance for rounding, so that slices stick out by a little less or a little more.
LENGTHS = st.one_of(st.integers(0, 9), st.integers(500, 2500), st.integers(0, 9000))
ROWS = st.lists(st.tuples(st.integers(0, 1), st.one_of(st.integers(0, 12), st.integers(0, 9000)), LENGTHS))


@given(ROWS)
def test_parents_are_those_that_a_search_finds(rows):
    table = events(*rows)
    assert tree.parents(table).tolist() == searched(table)


@given(ROWS)
def test_rows_left_to_the_plain_loop_find_the_same_parents(rows):
    table = events(*rows)
    whole = tree.parents(table)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree, "_ROUNDS", 1)
        assert tree.parents(table).tolist() == whole.tolist()


@given(ROWS)
def test_self_time_is_what_no_child_covers(rows):
    table = events(*rows)
    parents = tree.parents(table)
    expected = []
    for row in range(len(table)):
        own = np.ones(table.duration[row], bool)
        for child in np.flatnonzero(parents == row):
            first = table.start[child] - table.start[row]
            own[first : first + table.duration[child]] = False
        expected.append(int(own.sum()))
    assert tree.self_time(table, parents).tolist() == expected


def test_a_call_stack():
    table = events((0, 0, 100), (0, 10, 50), (0, 20, 10), (0, 30, 30), (0, 70, 30), (1, 75, 5))
    parents = tree.parents(table)
    assert parents.tolist() == [-1, 0, 1, 1, 0, -1]
    assert tree.self_time(table, parents).tolist() == [20, 10, 10, 30, 30, 5]


def test_a_slice_that_starts_inside_its_sibling_and_ends_far_outside_is_no_child():
    # TraceLens counts such time several times over: each slice becomes a child of the one before it.
    rows = [(0, 10_000 * i, 15_000) for i in range(6)]
    table = events((0, 0, 100_000), *rows)
    parents = tree.parents(table)
    assert parents.tolist() == [-1, 0, 0, 0, 0, 0, 0]
    assert tree.self_time(table, parents)[0] == 100_000 - 65_000


def test_a_child_that_ends_after_its_parent_by_rounding_is_still_its_child():
    table = events((0, 0, 5000), (0, 1000, 4900))
    assert tree.parents(table).tolist() == [-1, 0]
    assert tree.self_time(table, tree.parents(table)).tolist() == [1000, 4900]


def test_slices_without_duration_belong_to_what_is_open_then():
    table = events((0, 0, 10), (0, 4, 0), (0, 10, 5), (0, 10, 0))
    assert tree.parents(table).tolist() == [-1, 0, -1, 2]
    assert tree.parents(events((0, 0, 10), (0, 10, 0))).tolist() == [-1, -1]


def test_identical_slices_nest_in_their_order():
    table = events((0, 0, 10), (0, 0, 10), (0, 0, 10))
    assert tree.parents(table).tolist() == [-1, 0, 1]
    assert tree.self_time(table, tree.parents(table)).tolist() == [0, 0, 10]


def test_a_stack_of_fifty_thousand_levels():
    depth = 50_000
    table = events(*((0, i, 3 * depth - 2 * i) for i in range(depth)), (0, 2 * depth, 2 * depth))
    parents = tree.parents(table)
    assert parents[:depth].tolist() == list(range(-1, depth - 1))
    assert parents[depth] == -1


def test_the_nearest_of_a_kind():
    parents = np.array([-1, 0, 1, 2, 0], np.int32)
    wanted = np.array([True, False, False, True, False])
    assert tree.nearest(wanted, parents).tolist() == [0, 0, 0, 3, 0]
    assert tree.nearest(np.zeros(5, bool), parents).tolist() == [-1] * 5


def test_a_kernel_belongs_to_the_runtime_call_of_its_correlation():
    rows = [
        (Kind.RUNTIME, 0, 10, 7),
        (Kind.RUNTIME, 20, 10, 9),
        (Kind.OPERATOR, 40, 10, 9),
        (Kind.KERNEL, 5, 20, 7),
        (Kind.COMMUNICATION, 30, 5, 9),
        (Kind.COPY, 50, 5, 8),
        (Kind.KERNEL, 70, 5, -1),
    ]
    kind, start, duration, correlation = zip(*rows, strict=True)
    lane = [1 if kind in (Kind.KERNEL, Kind.COPY, Kind.COMMUNICATION) else 0 for kind in kind]
    table = Events.of(
        kind=kind, start=start, duration=duration, correlation=correlation, lane=lane, name=[0] * len(rows)
    )
    assert tree.launched_by(table).tolist() == [-1, -1, -1, 0, 1, -1, -1]
