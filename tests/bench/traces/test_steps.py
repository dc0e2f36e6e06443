"""Steps of a loop: given, missing, empty, cut short; nothing is dropped without being counted."""

import numpy as np

from bench.traces.events import Events, Kind, Lane, Trace
from bench.traces.steps import WHOLE, steps

THREAD, STREAM = Lane("python 1", "thread 1"), Lane("GPU 0", "stream 7", device=0)


def trace(rows, lanes=(THREAD, STREAM)):
    """Rows of (name, kind, lane, start, duration)."""
    names = list(dict.fromkeys(row[0] for row in rows))
    table = Events.of(
        name=[names.index(row[0]) for row in rows],
        kind=[row[1] for row in rows],
        lane=[row[2] for row in rows],
        start=[row[3] for row in rows],
        duration=[row[4] for row in rows],
    )
    return Trace("a.json", "kineto", table, names, list(lanes))


def loop(operations, first=0):
    """A step of 100 ns for each entry, with that many operations in it."""
    rows = []
    for number, count in enumerate(operations, first):
        begin = 100 * (number - first)
        rows.append((f"ProfilerStep#{number}", Kind.STEP, 0, begin, 100))
        rows += [("aten::mm", Kind.OPERATOR, 0, begin + 5 * i, 4) for i in range(count)]
    return rows


def test_each_mark_is_a_window():
    found = steps(trace(loop([6, 6, 6], first=4)))
    assert found.names == ["ProfilerStep#4", "ProfilerStep#5", "ProfilerStep#6"]
    assert (found.start.tolist(), found.end.tolist()) == ([0, 100, 200], [100, 200, 300])
    assert found.complete.all()
    assert found.sentence() == "3 steps"


def test_a_trace_without_steps_is_one_and_says_so():
    found = steps(trace([("aten::mm", Kind.OPERATOR, 0, 30, 20), ("gemm", Kind.KERNEL, 1, 60, 40)]))
    assert (found.names, found.start.tolist(), found.end.tolist()) == ([WHOLE], [30], [100])
    assert not found.given
    assert "no steps are marked" in found.sentence()


def test_a_step_cut_by_the_end_of_the_record_is_counted_not_dropped():
    found = steps(trace(loop([6, 7, 6, 2])))
    assert found.complete.tolist() == [True, True, True, False]
    assert found.sentence() == "4 steps, of which 1 incomplete at the end"


def test_a_step_in_which_the_record_began():
    found = steps(trace(loop([1, 7, 6, 7])))
    assert found.complete.tolist() == [False, True, True, True]
    assert found.trimmed == {"incomplete at the start": 1}


def test_steps_in_which_nothing_was_recorded_are_counted_as_empty():
    # A chunk with 30 of 32 empty steps makes an average over steps worthless.
    found = steps(trace(loop([5, 5, *[0] * 30])))
    assert found.complete.sum() == 2
    assert found.trimmed == {"empty": 30}


def test_two_steps_of_different_size_are_both_kept():
    assert steps(trace(loop([9, 2]))).complete.all()


def test_a_device_copy_of_the_marks_is_not_a_second_loop():
    copies = [(f"ProfilerStep#{number}", Kind.STEP, 1, 100 * number + 50, 90) for number in range(3)]
    rows = loop([5, 5]) + copies
    assert steps(trace(rows)).start.tolist() == [0, 100]


def test_marks_on_a_device_alone_serve():
    rows = [("ProfilerStep#0", Kind.STEP, 1, 50, 90), ("gemm", Kind.KERNEL, 1, 60, 40)]
    found = steps(trace(rows))
    assert (found.names, found.complete.all()) == (["ProfilerStep#0"], True)


def test_a_step_inside_another_is_left_out_and_counted():
    rows = [*loop([5, 5]), ("validation", Kind.STEP, 0, 120, 50)]
    found = steps(trace(rows))
    assert len(found) == 2
    assert found.trimmed == {"inside another and left out": 1}


def test_an_empty_trace_is_one_empty_step():
    found = steps(trace([]))
    assert (found.start.tolist(), found.end.tolist()) == ([0], [0])
    assert np.all(~found.given)


def training(calls, name="Optimizer.step#AdamW.step"):
    """A loop without marks: work for 80 ns, then 20 ns of the optimizer, so many times; a start of 500 ns."""
    rows = [("import", Kind.FUNCTION, 0, 0, 500)]
    for number in range(calls):
        begin = 500 + 100 * number
        rows += [("aten::mm", Kind.OPERATOR, 0, begin, 80), (name, Kind.ANNOTATION, 0, begin + 80, 20)]
    return rows


def test_calls_of_the_optimizer_end_steps_where_none_are_marked():
    found = steps(trace(training(4)))
    assert found.given
    assert (found.start.tolist(), found.end.tolist()) == ([600, 700, 800], [700, 800, 900])
    assert found.names == ["optimizer step 2", "optimizer step 3", "optimizer step 4"]
    assert found.sentence() == (
        "3 steps between calls of the optimizer, of which 1 before the first call left out"
    )


def test_of_two_optimizers_the_one_called_more_often_ends_steps():
    rare = [("Optimizer.step#SGD.step", Kind.ANNOTATION, 0, 750, 1), ("aten::mm", Kind.OPERATOR, 0, 740, 2)]
    assert len(steps(trace(training(4) + rare))) == 3


def test_marked_steps_come_before_calls_of_the_optimizer():
    found = steps(trace(loop([6, 6, 6]) + training(4)))
    assert found.names == ["ProfilerStep#0", "ProfilerStep#1", "ProfilerStep#2"]


def test_two_calls_of_the_optimizer_make_no_sample():
    assert not steps(trace(training(2))).given
