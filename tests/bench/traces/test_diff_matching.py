"""Which operation of one report is which of another."""

import pytest

from bench.traces.matching import Frame, Key, match, stable_name


def key(*names, what="operation", shape="[[2, 3]]"):
    return Key(what, tuple(Frame(name, shape) for name in names))


def how(base, new):
    return {(found.how, found.base, found.new) for found in match(base, new)}


def test_the_same_place_is_the_same_operation():
    linear, mm = key("aten::linear"), key("aten::linear", "aten::mm")
    assert how([linear, mm], [mm, linear]) == {
        ("same place", (linear,), (linear,)),
        ("same place", (mm,), (mm,)),
    }


def test_equal_names_at_other_places_are_not_mixed_up():
    forward, backward = key("aten::mm"), key("MmBackward0", "aten::mm")
    assert how([forward, backward], [backward]) == {
        ("same place", (backward,), (backward,)),
        ("removed", (forward,), ()),
    }


def test_other_shapes_at_the_same_place():
    small, large = key("aten::mm", shape="[[2, 3]]"), key("aten::mm", shape="[[4, 3]]")
    assert how([small], [large]) == {("other shapes", (small,), (large,))}


def test_an_operator_that_calls_others_inside_has_another_implementation():
    base = [key("aten::sdpa"), key("aten::sdpa", "aten::bmm"), key("aten::sdpa", "aten::softmax")]
    new = [key("aten::sdpa"), key("aten::sdpa", "aten::flash")]
    assert how(base, new) == {
        ("same place", (base[0],), (new[0],)),
        ("other implementation", (base[1], base[2]), (new[1],)),
    }


def test_an_operation_that_moved_is_found_again():
    before, after = key("Old", "aten::mm"), key("New", "aten::mm")
    assert how([before], [after]) == {("other place", (before,), (after,))}
    resized = key("New", "aten::mm", shape="[[9, 9]]")
    assert how([before], [resized]) == {("other place and shapes", (before,), (resized,))}


def test_what_is_of_another_sort_is_never_matched():
    work, talk = key("x"), key("x", what="communication")
    assert how([work], [talk]) == {("removed", (work,), ()), ("added", (), (talk,))}


@pytest.mark.parametrize(
    ("name", "stable"),
    [
        ("ProfilerStep#17", "ProfilerStep"),
        ("enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__", "enumerate(DataLoader)"),
        ("Optimizer.step#SGD.step", "Optimizer.step"),
        ("torch/nn/modules/module.py(1773): _call_impl", "torch/nn/modules/module.py: _call_impl"),
        ("<built-in method at 0x7d6a9b355530>", "<built-in method>"),
        ("work (job.py:12)", "work (job.py)"),
        ("layer#3", "layer#3"),
        ("aten::mm", "aten::mm"),
    ],
)
def test_names_lose_what_differs_from_run_to_run(name, stable):
    assert stable_name(name) == stable
