"""Why nothing ran: each cause on a trace made for it, and that no nanosecond is lost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables_of_events import (
    BACKWARD,
    COMMUNICATION_STREAM,
    COMPUTE_STREAM,
    LANES,
    MAIN,
    launched,
    trace,
)

from bench.traces import tree
from bench.traces.analysis import analyse
from bench.traces.breakdown import activities, whole
from bench.traces.causes import Cause, is_input
from bench.traces.events import Kind
from bench.traces.idle import LATENCY_NS, idle_reasons, stream_waits
from bench.traces.intervals import total, union


def found(made):
    """The reasons of the first device, or of the host."""
    parents, launches = tree.parents(made.events), tree.launched_by(made.events)
    return idle_reasons(made, activities(made)[0], parents, launches)


def reasons(made):
    """{(cause, name): nanoseconds}"""
    return {(one.cause, one.name): one.time for one in found(made)}


def gap(*meanwhile, called=900_000, second=905_000):
    """Two kernels with a gap of 800 us from 100 us on; the second is launched at the end of the gap."""
    first = launched(1, "gemm", 0, 5, 100_000)
    return trace([*first, *meanwhile, *launched(2, "gemm", called, second, 1_000_000)])


def test_the_host_was_in_an_operator_named_by_the_outermost():
    made = gap(
        (Kind.OPERATOR, "aten::linear", MAIN, 100_000, 890_000),
        (Kind.OPERATOR, "aten::addmm", MAIN, 300_000, 800_000),
    )
    found = reasons(made)
    assert found[Cause.OPERATOR, "aten::linear"] == 790_000
    assert found[Cause.LATENCY, ""] == 5_000
    assert found[Cause.UNKNOWN, "nothing is recorded of the host"] == 10_000


@pytest.mark.parametrize(
    ("kind", "name", "cause", "label"),
    [
        (Kind.FUNCTION, "train.py(12): collate", Cause.PYTHON, "train.py(12): collate"),
        (Kind.SYNCHRONIZATION, "cudaStreamSynchronize", Cause.DEVICE, "cudaStreamSynchronize"),
        (Kind.RUNTIME, "cudaFree", Cause.RUNTIME, "cudaFree"),
        (Kind.WAIT, "lock.acquire", Cause.WAIT, "lock.acquire"),
        (Kind.ANNOTATION, "## forward ##", Cause.BETWEEN, "## forward ##"),
        (Kind.STEP, "ProfilerStep#7", Cause.BETWEEN, ""),
        (Kind.OPERATOR, "enumerate(DataLoader)#__next__", Cause.INPUT, "enumerate(DataLoader)#__next__"),
        (Kind.OPERATOR, "c10d::allreduce_", Cause.DISTRIBUTED, "c10d::allreduce_"),
        (Kind.UNCLASSIFIED, "whatever", Cause.UNKNOWN, "whatever"),
    ],
)
def test_what_the_host_did_instead_of_launching(kind, name, cause, label):
    assert reasons(gap((kind, name, MAIN, 100_000, 900_000)))[cause, label] == 800_000


def test_an_item_in_an_operator_waits_for_the_device():
    made = gap(
        (Kind.OPERATOR, "aten::item", MAIN, 100_000, 900_000),
        (Kind.SYNCHRONIZATION, "cudaStreamSynchronize", MAIN, 100_000, 900_000),
    )
    assert reasons(made)[Cause.DEVICE, "cudaStreamSynchronize in aten::item"] == 800_000


def test_whatever_happens_in_a_data_loader_is_waiting_for_input():
    made = gap(
        (Kind.OPERATOR, "enumerate(DataLoader)#__next__", MAIN, 100_000, 900_000),
        (Kind.OPERATOR, "aten::stack", MAIN, 200_000, 700_000),
    )
    assert reasons(made)[Cause.INPUT, "enumerate(DataLoader)#__next__"] == 800_000


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__", True),
        ("train.py(12): load_batch", True),
        ("load_batch (train.py:12)", True),
        ("$train.py:12 load_batch", True),
        ("torch/utils/data/dataloader.py(701): __next__", True),
        ("__next__ (/env/torch/utils/data/dataloader.py:701)", True),
        ("/home/me/dataloader-bench/train.py(12): main", False),
        ("main (/home/me/dataloader-bench/train.py:12)", False),
        ("$dataloader.py:12 main", False),
        ("aten::mm", False),
    ],
)
def test_a_functions_own_name_says_that_it_loads_and_its_file_does_not(name, wanted):
    assert is_input(name) == wanted


def test_what_encloses_a_whole_step_waits_for_no_batch():
    made = gap(
        (Kind.FUNCTION, "train.py(3): dataloader_benchmark", MAIN, 100_000, 900_000),
        (Kind.STEP, "ProfilerStep#7", MAIN, 150_000, 850_000),
        (Kind.FUNCTION, "train.py(9): load_batch", MAIN, 200_000, 300_000),
    )
    assert reasons(made) == {
        (Cause.INPUT, "train.py(9): load_batch"): 100_000,
        (Cause.PYTHON, "train.py(3): dataloader_benchmark"): 100_000,
        (Cause.BETWEEN, ""): 600_000,
        (Cause.LATENCY, ""): 5_000,
    }


def test_a_backward_thread_with_nothing_to_do_waits_for_the_main_thread():
    made = trace(
        [
            *launched(1, "gemm", 0, 5, 100_000),
            (Kind.OPERATOR, "aten::cross_entropy", MAIN, 100_000, 900_000),
            *launched(2, "gemm_backward", 900_000, 905_000, 1_000_000, thread=BACKWARD),
            *launched(3, "gemm_backward", 910_000, 1_000_000, 1_100_000, thread=BACKWARD),
            *launched(4, "adam", 920_000, 1_100_000, 1_200_000),
        ]
    )
    assert reasons(made)[Cause.OPERATOR, "aten::cross_entropy"] == 800_000


def test_a_launch_call_that_takes_long_is_named():
    call = (Kind.RUNTIME, "cudaLaunchKernel", MAIN, 100_000, 895_000, {"correlation": 2})
    made = trace(
        [
            *launched(1, "gemm", 0, 5, 100_000),
            call,
            (Kind.KERNEL, "gemm", COMPUTE_STREAM, 900_000, 950_000, {"correlation": 2}),
        ]
    )
    assert reasons(made) == {(Cause.RUNTIME, "cudaLaunchKernel"): 795_000, (Cause.LATENCY, ""): 5_000}


def test_what_was_launched_and_did_not_start_has_no_known_cause():
    found = reasons(gap(called=50_000))
    assert found == {
        (Cause.UNKNOWN, "launched, and nothing else ran"): 805_000,
    }


def test_a_kernel_without_a_launch_in_the_report():
    made = trace(
        [(Kind.KERNEL, "gemm", COMPUTE_STREAM, 0, 10), (Kind.KERNEL, "gemm", COMPUTE_STREAM, 30, 40)]
    )
    assert reasons(made) == {(Cause.UNKNOWN, "the launch is not in the report"): 20}


def test_a_stream_waits_for_communication_while_the_device_is_busy():
    made = trace(
        [
            *launched(1, "gemm", 0, 10, 100),
            *launched(2, "ncclAllReduce", 20, 90, 400, lane=COMMUNICATION_STREAM, kind=Kind.COMMUNICATION),
            *launched(3, "gemm", 30, 405, 500),
        ]
    )
    activity = activities(made)[0]
    waits = stream_waits(made, activity, tree.launched_by(made.events))
    assert [(one.cause, one.name, one.time) for one in waits] == [(Cause.COMMUNICATION, "ncclAllReduce", 300)]
    assert reasons(made) == {(Cause.LATENCY, ""): 5}


def test_a_gap_that_no_slice_ends_goes_by_the_main_thread():
    # A step after whose last kernel the host logs, and nothing is launched any more.
    made = trace(
        [
            *launched(1, "gemm", 0, 5, 100),
            (Kind.STEP, "ProfilerStep#0", MAIN, 5, 400),
            (Kind.FUNCTION, "train.py(9): log", MAIN, 150, 400),
        ]
    )
    (unit,) = analyse(made, step="0").units
    found = {(one.cause, one.name): one.time for one in unit.idle}
    assert found == {(Cause.PYTHON, "train.py(9): log"): 250, (Cause.BETWEEN, ""): 50}
    marks = [
        (Kind.KERNEL, "gemm", COMPUTE_STREAM, 0, 100),
        (Kind.STEP, "ProfilerStep#0", COMPUTE_STREAM, 0, 400),
    ]
    (unit,) = analyse(trace(marks), step="0").units
    assert [(one.cause, one.time) for one in unit.idle] == [(Cause.UNKNOWN, 300)]


def test_the_host_of_a_trace_without_devices():
    made = trace(
        [
            (Kind.STEP, "ProfilerStep#1", MAIN, 0, 100),
            (Kind.OPERATOR, "aten::mm", MAIN, 0, 30),
            (Kind.FUNCTION, "train.py(3): log", MAIN, 30, 50),
            (Kind.WAIT, "queue.get", BACKWARD, 40, 120),
            (Kind.OPERATOR, "aten::mm", MAIN, 90, 100),
        ]
    )
    assert reasons(made) == {
        (Cause.BETWEEN, ""): 40,
        (Cause.PYTHON, "train.py(3): log"): 20,
        (Cause.WAIT, "queue.get"): 20,
    }


def test_pieces_are_those_of_time_and_not_of_the_slices_around_them():
    """Between two operators the host is in two functions, one at once after the other; before and after them
    nothing is recorded."""
    rows = [
        (Kind.OPERATOR, "aten::mm", MAIN, 0, 30),
        (Kind.FUNCTION, "f", MAIN, 50, 60),
        (Kind.FUNCTION, "g", MAIN, 60, 70),
        (Kind.OPERATOR, "aten::mm", MAIN, 90, 100),
    ]
    (unknown,) = [one for one in found(trace(rows)) if one.cause is Cause.UNKNOWN]
    assert (unknown.time, unknown.pieces) == (40, 2)


KINDS_OF_LANE = {
    MAIN: (Kind.OPERATOR, Kind.FUNCTION, Kind.RUNTIME, Kind.SYNCHRONIZATION, Kind.ANNOTATION, Kind.WAIT),
    BACKWARD: (Kind.OPERATOR, Kind.RUNTIME, Kind.COMMUNICATION),
    COMPUTE_STREAM: (Kind.KERNEL, Kind.COPY),
    COMMUNICATION_STREAM: (Kind.COMMUNICATION, Kind.SET),
}
# Around the latency, so that gaps fall on both sides of it.
TIMES = st.tuples(*[st.one_of(st.integers(0, 60), st.integers(0, 4 * LATENCY_NS))] * 2).map(sorted)


@st.composite
def anything(draw, lanes):
    rows = []
    for _ in range(draw(st.integers(0, 14))):
        lane = draw(st.sampled_from(lanes))
        kind = draw(st.sampled_from(KINDS_OF_LANE[lane]))
        rows.append((kind, f"{kind.name}", lane, *draw(TIMES), {"correlation": draw(st.integers(-1, 4))}))
    return rows


@given(st.one_of(anything(LANES), anything((MAIN, BACKWARD))))
def test_the_reasons_sum_to_the_idle_time_whatever_the_trace(rows):
    made = trace(rows)
    for activity in activities(made):
        found = idle_reasons(made, activity, tree.parents(made.events), tree.launched_by(made.events))
        assert sum(one.time for one in found) == whole(activity).idle
        assert all(one.time > 0 and one.pieces > 0 for one in found)


@given(anything((MAIN,)))
def test_innermost_pieces_of_a_lane_never_overlap_and_miss_no_covered_moment(rows):
    made = trace(rows)
    parents = tree.parents(made.events)
    pieces = tree.innermost(made.events, parents, 0, len(rows))
    assert (pieces.end > pieces.start).all()
    assert (pieces.start[1:] >= pieces.end[:-1]).all()
    inside = made.events.start[pieces.row] <= pieces.start
    assert inside.all()
    nested = tree.self_time(made.events, parents)
    lengths = np.zeros(len(rows), np.int64)
    np.add.at(lengths, pieces.row, pieces.end - pieces.start)
    if (made.events.start[1:] >= np.maximum.accumulate(made.events.end)[:-1]).all():  # one after the other
        assert lengths.tolist() == nested.tolist() == made.events.duration.tolist()
    assert lengths.sum() == total(*union(made.events.start, made.events.end))


def test_after_slices_that_cross_the_one_around_them_goes_on():
    spans = [(0, 5), (0, 3), (1, 4), (3, 4)]
    made = trace([(Kind.OPERATOR, "operator", MAIN, begin, end, {}) for begin, end in spans])
    pieces = tree.innermost(made.events, tree.parents(made.events), 0, len(spans))
    assert (pieces.start[-1], pieces.end[-1], made.events.duration[pieces.row[-1]]) == (4, 5, 5)
