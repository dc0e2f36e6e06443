"""Reports that only say what each function spent itself (cProfile): nothing encloses anything in them."""

import pytest
from seeded_traces import job
from tables_of_events import MAIN, trace

from bench.traces.analysis import analyse
from bench.traces.diff import difference
from bench.traces.diff_steps import step_table
from bench.traces.events import Kind
from bench.traces.page.flame import call_tree

SECOND = 1_000_000_000


def profile(**seconds):
    rows = [(Kind.FUNCTION, name, MAIN, 0, round(own * SECOND)) for name, own in seconds.items()]
    return trace(rows, timed=False, nested=False, format="cprofile")


PROFILE = {"f": 10, "g": 9, "h": 3, "tiny": 1e-6}


def test_a_step_of_own_times_is_their_sum():
    table = step_table(profile(**PROFILE))
    taken = dict(zip((key.path[-1].name for key in table.keys), table.nanoseconds[0].tolist(), strict=True))
    assert taken == {name: own * SECOND for name, own in PROFILE.items()}


def test_what_became_shorter_makes_nothing_else_longer():
    found = difference(job(profile(**PROFILE)), job(profile(**PROFILE | {"g": 5})))
    assert (found.base_seconds, found.new_seconds) == pytest.approx((22.000001, 18.000001))
    changed = {row.name: row.seconds for row in found.rows if row.seconds}
    assert changed == {"g": pytest.approx(-4)}


def test_a_call_tree_of_own_times_is_flat_however_many_functions_there_are():
    many = {f"f{number}": 1 + number for number in range(600)}
    tree = call_tree([profile(**many)])
    assert (set(tree.parent), tree.too_deep) == ({-1}, 0)
    assert dict(zip(tree.name, tree.host, strict=True)) == {name: own * SECOND for name, own in many.items()}


def test_the_tables_have_own_times_too():
    sums = analyse(profile(**PROFILE)).sums
    assert sums.self_time == round(22.000001 * SECOND)
