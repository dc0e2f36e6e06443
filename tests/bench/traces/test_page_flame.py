"""Call trees: every nanosecond of self time is in one node, kernels hang below what launched them."""

import time

from drawn_job import MS, STEPS, bottomless, many, trace_of, training, unpacked
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.traces.events import Events, Kind, Lane, Trace
from bench.traces.page.flame import UNLAUNCHED, call_tree, difference_flame, flame, overlay
from bench.traces.page.packing import Words
from bench.traces.tree import parents, self_time


def nodes(tree):
    """path -> (host, device, calls) of each node itself."""
    columns = zip(tree.host, tree.device, tree.calls, strict=True)
    return {tuple(tree.path(number)): values for number, values in enumerate(columns)}


def test_steps_are_one_node_and_kernels_hang_below_their_launch():
    found = nodes(call_tree([training()]))
    above = ("ProfilerStep", "forward", "aten::mm", "cudaLaunchKernel")
    assert found[(*above, "gemm")] == (0, STEPS * 2 * MS, STEPS)
    assert found[above] == (STEPS * MS // 2, 0, STEPS)
    assert found[("ProfilerStep", "forward")] == (STEPS * 2 * MS, 0, STEPS)
    assert found[(UNLAUNCHED, "all_reduce")] == (0, STEPS * MS, STEPS)
    assert len(found) == 7


def test_ranks_are_summed():
    one, both = nodes(call_tree([training(0)])), nodes(call_tree([training(0), training(1)]))
    assert both == {path: tuple(2 * value for value in values) for path, values in one.items()}


SPANS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 30_000), st.integers(0, 30_000), st.integers(0, 3)),
    max_size=40,
)


@given(SPANS, st.integers(1, 12))
@settings(max_examples=200)
def test_all_time_is_in_the_tree_and_in_what_is_drawn(spans, most):
    events = Events.of(
        lane=[lane for lane, *_ in spans],
        start=[start for _, start, *_ in spans],
        duration=[span[2] for span in spans],
        name=[span[3] for span in spans],
        kind=[Kind.KERNEL if span[0] == 2 else Kind.OPERATOR for span in spans],
    )
    lanes = [Lane("p", "a"), Lane("p", "b"), Lane("p", "s", 0)]
    tree = call_tree([Trace("t", "kineto", events, list("abcd"), lanes)])
    on_device = events.lane == 2
    own = self_time(events, parents(events))
    assert sum(tree.host) == own[~on_device].sum()
    assert sum(tree.device) == events.duration[on_device].sum()
    assert tree.too_deep == 0
    # However few nodes are drawn, their sum is the whole.
    shown = flame(tree, Words(), most)
    assert sum(unpacked(shown.data["host"])) == sum(tree.host)
    assert sum(unpacked(shown.data["device"])) == sum(tree.device)
    assert shown.merged == max(0, len(tree) - most)
    assert all(code <= number for number, code in enumerate(unpacked(shown.data["parent"])))


def test_what_is_small_is_put_together_below_its_caller():
    rows = [("main", Kind.OPERATOR, 0, 0, 100 * MS, -1)]
    rows += [(f"part {i}", Kind.OPERATOR, 0, i * 10 * MS, (9 - i) * MS, -1) for i in range(9)]
    words = Words()
    shown = flame(call_tree([trace_of(rows)]), words, 4)
    names = [words.texts[code] for code in unpacked(shown.data["name"])]
    assert names == ["main", "part 0", "part 1", "part 2", "(6 smaller)"]
    assert unpacked(shown.data["parent"]) == [0, 1, 1, 1, 1]
    assert unpacked(shown.data["host"])[-1] == sum(range(1, 7)) * MS


def test_two_trees_lie_over_one_another_by_path():
    base, new = call_tree([training()]), call_tree([training(slow=1.5), training(slow=1.5)])
    both = overlay(base, new, (STEPS, 2 * STEPS))
    numbers = {tuple(both.tree.path(number))[-1]: number for number in range(len(both.tree))}
    gemm = {name: values[numbers["gemm"]] for name, values in both.weights.items()}
    assert gemm == {"base_host": 0, "new_host": 0, "base_device": 2 * MS, "new_device": 3 * MS}
    assert all(both.weights["base_host"] == both.weights["new_host"])
    assert set(difference_flame(both, Words()).data["weights"]) == set(both.weights)


def test_what_only_one_side_has_weighs_nothing_on_the_other():
    base = call_tree([trace_of([("old", Kind.OPERATOR, 0, 0, MS, -1)])])
    new = call_tree([trace_of([("fresh", Kind.OPERATOR, 0, 0, 2 * MS, -1)])])
    both = overlay(base, new, (1, 1))
    weights = {name: both.weights[f"{name}_host"].tolist() for name in ("base", "new")}
    assert (both.tree.name, weights) == (["old", "fresh"], {"base": [MS, 0], "new": [0, 2 * MS]})


def test_a_bottomless_stack_ends_and_the_rest_is_counted():
    depth = 20_000
    events = bottomless(depth)
    begun = time.process_time()
    tree = call_tree([Trace("t", "kineto", events, ["deeper"], [Lane("p", "t")])])
    assert time.process_time() - begun < 5
    assert (len(tree), tree.too_deep) == (500, depth - 500)


def test_a_large_trace_takes_little_time():
    begun = time.process_time()
    tree = call_tree([many(200_000)])
    shown = flame(tree, Words())
    assert time.process_time() - begun < 8
    assert len(tree) == shown.merged + 12_000 > 12_000
    assert shown.nodes <= 2 * 12_000 + 1
