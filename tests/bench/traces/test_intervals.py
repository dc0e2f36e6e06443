"""Interval algebra against sets of single nanoseconds."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bench.traces.intervals import Intervals, covered, intersect, nothing, subtract, total, union

MOMENTS = st.integers(-20, 40)
PAIRS = st.lists(st.tuples(MOMENTS, MOMENTS).map(sorted), max_size=12)


def arrays(pairs):
    table = np.array(pairs, np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def moments(pairs):
    """The oracle: every nanosecond that an interval covers, one by one."""
    return {moment for start, end in pairs for moment in range(start, end)}


def tight(found):
    """The set's nanoseconds, after a look that no interval is empty and none touches the next."""
    start, end = found
    assert start.dtype == end.dtype == np.int64
    assert (start < end).all()
    assert (end[:-1] < start[1:]).all()
    return moments(zip(start.tolist(), end.tolist(), strict=True))


@given(PAIRS)
def test_a_union_covers_what_any_interval_covers(pairs):
    found = union(*arrays(pairs))
    assert tight(found) == moments(pairs)
    assert total(*found) == len(moments(pairs))


@given(PAIRS, PAIRS)
def test_intersection_and_difference_are_those_of_sets(first, second):
    a, b = union(*arrays(first)), union(*arrays(second))
    assert tight(intersect(a, b)) == moments(first) & moments(second)
    assert tight(subtract(a, b)) == moments(first) - moments(second)


@given(PAIRS, PAIRS)
def test_what_a_set_covers_of_each_interval(pairs, asked):
    by = union(*arrays(pairs))
    expected = [len(moments(pairs) & moments([interval])) for interval in asked]
    assert covered(by, *arrays(asked)).tolist() == expected


def test_touching_intervals_are_one_and_empty_ones_none():
    found = union(np.array([5, 0, 9]), np.array([7, 5, 9]))
    assert [found.start.tolist(), found.end.tolist()] == [[0], [7]]


def test_what_touches_leaves_no_empty_interval_between():
    whole = union(np.array([0]), np.array([10]))
    left = subtract(whole, Intervals(np.array([2, 4]), np.array([4, 6])))
    assert [left.start.tolist(), left.end.tolist()] == [[0, 6], [2, 10]]


def test_nothing_has_no_time_and_takes_none_away():
    some = Intervals(np.array([1, 5]), np.array([3, 9]))
    assert total(*nothing()) == 0
    assert total(*intersect(some, nothing())) == 0
    assert total(*subtract(some, nothing())) == total(*some) == 6
    assert covered(nothing(), np.array([0]), np.array([10])).tolist() == [0]


def test_times_of_this_century_in_nanoseconds_stay_exact():
    today = 1_790_857_026_000_000_001
    a = union(np.array([today]), np.array([today + 3]))
    b = union(np.array([today + 2]), np.array([today + 9]))
    assert intersect(a, b).start.tolist() == [today + 2]
    assert total(*subtract(b, a)) == 6
