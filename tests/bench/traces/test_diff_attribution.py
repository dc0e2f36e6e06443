"""Every moment of a step belongs to something, once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from seeded_traces import MS, loop

from bench.traces.diff_attribution import Standing, attribute
from bench.traces.diff_steps import step_table
from bench.traces.events import Events, Kind, Lane, Trace
from bench.traces.steps import steps
from bench.traces.tree import innermost_everywhere, parents

KINDS = (Kind.OPERATOR, Kind.FUNCTION, Kind.COMMUNICATION, Kind.WAIT, Kind.RUNTIME, Kind.ANNOTATION)
DEVICE_KINDS = (Kind.KERNEL, Kind.COPY, Kind.COMMUNICATION)
slices = st.tuples(
    st.integers(0, 60), st.integers(0, 30), st.integers(0, 2), st.sampled_from(KINDS), st.integers(0, 2)
)


def milliseconds(table):
    """{(what, names of the path): milliseconds of a step}"""
    mean = table.nanoseconds.mean(axis=0) / MS
    return {
        (key.what, *(f.name for f in key.path)): value for key, value in zip(table.keys, mean, strict=True)
    }


def test_host_operations_and_what_lies_between_them_are_the_step():
    table = step_table(loop({"aten::mm": 3.0, "gloo:all_reduce": 2.0}, steps=3, gap=0.5))
    assert milliseconds(table) == pytest.approx(
        {
            ("operation", "aten::mm"): 3.0,
            ("communication", "gloo:all_reduce"): 2.0,
            ("idle", "nothing recorded"): 0.5,
        }
    )
    assert table.nanoseconds.sum(axis=1) == pytest.approx([5.5 * MS] * 3)


def test_an_operator_keeps_what_its_inner_operators_leave():
    table = step_table(loop({"aten::mm": 3.0}, around="aten::linear", gap=0.25))
    assert milliseconds(table) == pytest.approx(
        {("operation", "aten::linear", "aten::mm"): 3.0, ("idle", "nothing recorded"): 0.25}
    )


def test_a_kernel_stands_at_the_operator_that_launched_it_and_the_rest_is_idle():
    table = step_table(loop({"aten::mm": 3.0}, kernels={"aten::mm": "sm90_gemm"}, gap=1.0))
    assert table.on_device
    assert milliseconds(table) == pytest.approx({("operation", "aten::mm"): 3.0, ("idle", "launching"): 1.0})
    (key,) = [key for key in table.keys if key.what == "operation"]
    assert list(table.kernels[key]) == ["sm90_gemm"]


def test_communication_beside_computation_is_hidden_and_the_rest_exposed():
    """A kernel from 0 to 10, a collective from 6 to 20, a copy from 15 to 30, the step until 40."""
    events = Events.of(
        start=[0, 0, 6, 15],
        duration=[40, 10, 14, 15],
        name=[0, 1, 2, 3],
        kind=[Kind.STEP, Kind.KERNEL, Kind.COMMUNICATION, Kind.COPY],
        lane=[0, 1, 2, 3],
    )
    lanes = [Lane("host", "1"), *(Lane("GPU", f"stream {number}", 0) for number in range(3))]
    trace = Trace("", "kineto", events, ["ProfilerStep#0", "gemm", "nccl", "memcpy"], lanes)
    shares = attribute(trace, parents(events), steps(trace))
    assert dict(zip(shares.standing.tolist(), shares.nanoseconds.tolist(), strict=True)) == {
        Standing.COMPUTE: 10,
        Standing.COMMUNICATION: 10,
        Standing.COPY: 10,
        Standing.IDLE: 10,
    }


@given(st.lists(slices, min_size=1, max_size=25), st.integers(1, 3), st.booleans())
def test_shares_sum_to_the_steps_whatever_overlaps(rows, count, with_device):
    """Slices may nest, overlap, stick out of their parents or have no length."""
    start, duration, lane, kind, name = (list(column) for column in zip(*rows, strict=True))
    length = 30
    start += [length * step for step in range(count)]
    duration += [length] * count
    lane += [0] * count
    kind += [Kind.STEP] * count
    name += [3] * count
    lanes = [Lane("host", "1"), Lane("host", "2"), Lane("other", "3", 0 if with_device else -1)]
    if with_device:
        kind = [
            DEVICE_KINDS[k % 3] if place == 2 and k != Kind.STEP else k
            for k, place in zip(kind, lane, strict=True)
        ]
    events = Events.of(start=start, duration=duration, lane=lane, kind=kind, name=name)
    trace = Trace("", "kineto", events, ["a", "b", "c", "ProfilerStep#1"], lanes)
    cut = steps(trace)
    shares = attribute(trace, parents(events), cut)
    assert (shares.nanoseconds >= 0).all()
    sums = np.bincount(shares.step, shares.nanoseconds, minlength=len(cut))
    assert sums == pytest.approx((cut.end - cut.start).astype(float))


@given(st.lists(slices, min_size=1, max_size=30))
def test_innermost_pieces_of_a_lane_never_overlap_and_lie_in_their_slices(rows):
    start, duration, lane, kind, name = zip(*rows, strict=True)
    events = Events.of(start=start, duration=duration, lane=lane, kind=kind, name=name)
    begun, ended, row = innermost_everywhere(events, parents(events))
    assert (begun < ended).all()
    assert (events.start[row] <= begun).all()
    assert (ended <= events.end[row]).all()
    for number in set(lane):
        mine = events.lane[row] == number
        assert (ended[mine][:-1] <= begun[mine][1:]).all()
        covered = {t for s, d, place, *_ in rows if place == number for t in range(s, s + d)}
        assert (ended[mine] - begun[mine]).sum() <= len(covered)
