"""Compute, communication, copies and idle: against sets of nanoseconds, and TraceLens's own report."""

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables_of_events import BACKWARD, COMMUNICATION_STREAM, COMPUTE_STREAM, MAIN, trace

from bench.traces.breakdown import HOST, activities, breakdown, exposed_by_name, lanes, together, whole
from bench.traces.diff_attribution import Standing, standings
from bench.traces.events import Kind, Lane
from bench.traces.idle import idle_reasons
from bench.traces.intervals import total
from bench.traces.load import load
from bench.traces.ranks_late import Spent
from bench.traces.ranks_own import working
from bench.traces.tree import launched_by, parents

TRACES = Path(__file__).resolve().parents[4] / "shared" / "traces"
REFERENCE = TRACES / "ref" / "tracelens_h100_qwen0.5b"
SECOND_GPU = Lane("GPU 1", "stream 7", device=1)
GLOO = Lane("python 1", "thread 3 (pt_gloo_runloop)")
STREAMS = (COMPUTE_STREAM, COMMUNICATION_STREAM, SECOND_GPU, MAIN)
DEVICE_KINDS = (Kind.KERNEL, Kind.COMMUNICATION, Kind.COPY, Kind.SET)
TIMES = st.tuples(st.integers(0, 40), st.integers(0, 40)).map(sorted)


def slices(kinds, lanes_):
    def row(kind, lane, times):
        return (kind, f"{kind.name} {lane.thread}", lane, *times)

    return st.lists(st.builds(row, st.sampled_from(kinds), st.sampled_from(lanes_), TIMES), max_size=12)


def moments(rows, *kinds):
    """The oracle: every nanosecond in which a slice of one of these kinds runs."""
    return {moment for kind, _, _, start, end in rows if kind in kinds for moment in range(start, end)}


@given(slices(DEVICE_KINDS, STREAMS[:3]), st.lists(TIMES, max_size=3))
def test_a_device_is_cut_into_parts_as_sets_of_nanoseconds_are(rows, windows):
    found = {activity.device: activity for activity in activities(trace(rows, STREAMS))}
    every = moments(rows, *DEVICE_KINDS)
    busy_devices = {row[2].device for row in rows if row[4] > row[3]}
    assert set(found) == (busy_devices or ({HOST} if rows else set()))
    for device in busy_devices:
        own = [row for row in rows if row[2].device == device]
        compute, communication = moments(own, Kind.KERNEL), moments(own, Kind.COMMUNICATION)
        copies = moments(own, Kind.COPY, Kind.SET)
        starts, ends = (np.array([window[side] for window in windows], np.int64) for side in (0, 1))
        cut = [*breakdown(found[device], starts, ends), whole(found[device])]
        for parts, (start, end) in zip(cut, [*windows, (min(every), max(every) + 1)], strict=True):
            window = set(range(start, end))
            assert parts.span == len(window)
            assert parts.compute == len(compute & window)
            assert parts.exposed == len((communication - compute) & window)
            assert parts.overlapped == len(communication & compute & window)
            assert parts.copies == len((copies - compute - communication) & window)
            assert parts.idle == len(window - compute - communication - copies)
            assert parts.compute + parts.exposed + parts.copies + parts.idle == parts.span


WAITS = (Kind.WAIT, Kind.SYNCHRONIZATION, Kind.COMMUNICATION)
HOST_KINDS = (*WAITS, Kind.OPERATOR, Kind.ANNOTATION, Kind.FUNCTION)


@given(slices(HOST_KINDS, (MAIN, BACKWARD, GLOO)))
def test_a_host_computes_while_a_thread_is_in_an_operator_and_does_not_wait_there(rows):
    found = activities(trace(rows, (MAIN, BACKWARD, GLOO)))
    if not rows:
        assert found == []
        return
    work = Kind.OPERATOR if any(row[0] is Kind.OPERATOR for row in rows) else Kind.FUNCTION
    compute = set()
    for thread in (MAIN, BACKWARD, GLOO):
        own = [row for row in rows if row[2] is thread]
        compute |= moments(own, work) - moments(own, *WAITS)
    communication = moments(rows, Kind.COMMUNICATION)
    parts = whole(found[0])
    assert parts.span == max(row[4] for row in rows) - min(row[3] for row in rows)
    assert parts.compute == len(compute)
    assert (parts.exposed, parts.overlapped) == (len(communication - compute), len(communication & compute))
    assert parts.idle == parts.span - len(compute | communication)


def test_gloo_on_its_own_thread_is_hidden_by_operators_of_the_main_thread():
    made = trace(
        [
            (Kind.OPERATOR, "aten::mm", MAIN, 0, 60),
            (Kind.OPERATOR, "c10d::allreduce_", MAIN, 60, 65),
            (Kind.COMMUNICATION, "gloo:all_reduce", GLOO, 40, 100),
        ],
        (MAIN, GLOO),
    )
    parts = whole(activities(made)[0])
    assert (parts.compute, parts.overlapped, parts.exposed, parts.idle) == (60, 20, 40, 0)

    assert exposed_by_name(made, activities(made)[0]) == {"gloo:all_reduce": 40}


WAITING = ["_c10d_functional::wait_tensor", "_c10d_functional_autograd::all_reduce", "c10d::allreduce_"]


@pytest.mark.parametrize("name", [*WAITING, "record_param_comms"])
def test_an_operator_that_waits_for_a_collective_computes_nothing_wherever_it_is_asked(name):
    made = trace(
        [
            (Kind.OPERATOR, "aten::mm", MAIN, 0, 50),
            (Kind.OPERATOR, name, MAIN, 50, 90),
            (Kind.COMMUNICATION, "gloo:all_reduce", GLOO, 40, 90),
        ],
        (MAIN, GLOO),
    )
    parts = whole(activities(made)[0])
    assert (parts.compute, parts.exposed) == (50, 40)
    assert total(*working(made)) == 50
    assert Spent.of(made).own.tolist() == [50]
    assert standings(made).tolist() == [Standing.COMPUTE, Standing.WAIT, Standing.COMMUNICATION]


def test_collectives_that_run_at_once_share_the_exposed_time_without_counting_it_twice():
    made = trace(
        [
            (Kind.KERNEL, "gemm", COMPUTE_STREAM, 0, 10),
            (Kind.COMMUNICATION, "all_reduce", COMMUNICATION_STREAM, 5, 40),
            (Kind.COMMUNICATION, "all_gather", COMPUTE_STREAM, 30, 50),
        ]
    )
    activity = activities(made)[0]
    assert exposed_by_name(made, activity) == {"all_reduce": 30, "all_gather": 10}
    assert whole(activity).exposed == 40


def test_a_device_that_starts_late_was_idle_while_the_other_worked():
    made = trace(
        [(Kind.KERNEL, "gemm", COMPUTE_STREAM, 0, 100), (Kind.KERNEL, "gemm", SECOND_GPU, 80, 100)], STREAMS
    )
    parts = [whole(activity) for activity in activities(made)]
    assert [each.idle for each in parts] == [0, 80]
    both = together(parts)
    assert (both.span, both.compute, both.idle) == (200, 120, 80)


def test_devices_that_two_processes_call_by_one_number_are_two():
    """Each rank sees one GPU only, and calls it 0."""
    first, second = (Lane(f"rank {rank}: python, GPU 0", "stream 7", device=0) for rank in range(2))
    rows = [
        (Kind.KERNEL, "gemm", first, 0, 100),
        (Kind.KERNEL, "gemm", second, 80, 90),
        (Kind.COMMUNICATION, "nccl", second, 90, 100),
    ]
    made = trace(rows, (first, second))
    units = activities(made)
    assert [unit.name for unit in units] == [f"device 0 ({lane.process})" for lane in (first, second)]
    assert [whole(unit).idle for unit in units] == [0, 80]
    assert [exposed_by_name(made, unit) for unit in units] == [{}, {"nccl": 10}]
    above, launched = parents(made.events), launched_by(made.events)
    idle = [sum(reason.time for reason in idle_reasons(made, unit, above, launched)) for unit in units]
    assert idle == [0, 80]


def test_a_trace_of_sums_has_no_parts():
    assert activities(trace([(Kind.FUNCTION, "f", MAIN, 0, 10)], timed=False)) == []


def test_lanes_by_what_they_are_in():
    made = trace(
        [
            (Kind.STEP, "ProfilerStep#0", MAIN, 0, 100),
            (Kind.OPERATOR, "aten::linear", MAIN, 10, 30),
            (Kind.OPERATOR, "aten::mm", MAIN, 15, 25),
            (Kind.RUNTIME, "cudaLaunchKernel", MAIN, 40, 45),
            (Kind.KERNEL, "gemm", COMPUTE_STREAM, 20, 80),
        ]
    )
    stream, thread = lanes(made)
    assert (made.lanes[stream.lane], stream.busy) == (COMPUTE_STREAM, 60)
    assert (made.lanes[thread.lane], thread.slices, thread.busy) == (MAIN, 4, 25)
    assert thread.by_kind == {Kind.STEP: 100, Kind.OPERATOR: 20, Kind.RUNTIME: 5}


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the real traces are not beside this checkout")
def test_equals_the_gpu_timeline_of_tracelens():
    # TraceLens leaves kernels out whose launch is not in the trace (509 of 1707 here) and counts fills as
    # compute; with that undone its figures are ours, to the rounding of its floats.
    with open(REFERENCE / "gpu_timeline.csv") as file:
        theirs = {row["type"]: round(float(row["time ms"]) * 1e6) for row in csv.DictReader(file)}
    read = load(TRACES / "tracelens_h100_qwen0.5b.json.gz").traces[0]
    linked = launched_by(read.events) >= 0
    read.events = read.events.select(linked)
    fills = read.events.kind == Kind.SET
    read.events.kind[fills] = Kind.KERNEL
    parts = whole(activities(read)[0])
    assert parts.span == pytest.approx(theirs["total_time"], abs=20)
    assert parts.compute == pytest.approx(theirs["computation_time"], abs=20)
    assert parts.copies == pytest.approx(theirs["exposed_memcpy_time"], abs=20)
    assert parts.idle == pytest.approx(theirs["idle_time"], abs=40)
    assert parts.exposed == theirs["exposed_comm_time"] == 0
