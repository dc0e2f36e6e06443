"""Ranks of a job: what is matched, whose clock is off, who is late and in what, how fast bytes moved."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from gloo_table import BACKEND, MAIN, TRANSFER, bulk_synchronous, even, trace_of
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.traces import ranks_late, ranks_text
from bench.traces.collectives import operation
from bench.traces.collectives_cost import bus_factor, total_bytes
from bench.traces.events import Job, Kind
from bench.traces.load import load
from bench.traces.ranks import compare_ranks

REAL = Path(__file__).parents[4] / "shared" / "traces"
MS = 1_000_000


# --- who is late -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [True, False])
def test_the_rank_that_works_longer_is_late_by_that(steps):
    own = even(3, 20)
    own[1] += 2 * MS
    found = compare_ranks(bulk_synchronous(own, steps=steps))
    (late,) = found.late
    assert (late.rank, late.operation.name) == (1, "work")
    assert late.excess_ns == pytest.approx(2 * MS, rel=0.1)
    assert late.cost.low < 7.1 / 5.1 < late.cost.high
    assert late.last == 20
    (row,) = found.collectives
    assert (row.late_rank, row.late_operation.name) == (1, "work")
    assert row.late_ns == pytest.approx(2 * MS, rel=0.1)
    assert "rank 1 is late" in ranks_text.sentence(found)
    assert "work" in ranks_text.sentence(found)


def test_among_equal_ranks_nobody_is_late():
    found = compare_ranks(bulk_synchronous(even(4, 30)))
    assert found.late == []
    assert found.collectives[0].late_rank is None
    assert ranks_text.sentence(found).startswith("no rank is late")


def test_both_of_two_late_ranks_among_four_are_named():
    own = even(4, 20)
    own[[0, 3]] *= 2
    assert {one.rank for one in compare_ranks(bulk_synchronous(own)).late} == {0, 3}


def test_a_rank_that_is_late_now_and_then_is_not_called_late_for_certain():
    own = even(2, 12)
    own[1, ::4] += 20 * MS
    assert compare_ranks(bulk_synchronous(own)).late == []


def test_two_steps_are_too_few_to_be_certain():
    own = even(2, 2)
    own[1, 0] *= 3
    found = compare_ranks(bulk_synchronous(own))
    assert found.late == []
    assert "no rank is late for certain: rank 1 may be" in ranks_text.sentence(found)


def test_each_ranks_table_of_operations_is_made_once(monkeypatch):
    own = even(4, 20)
    own[2] += 3 * MS
    made = []
    by_round = ranks_late._by_round
    monkeypatch.setattr(ranks_late, "_by_round", lambda *given: (made.append(given[-1]), by_round(*given))[1])
    found = compare_ranks(bulk_synchronous(own))
    assert made == [0, 1, 2, 3]
    (late,) = found.late
    assert (late.rank, late.operation.name) == (2, "work")
    others = np.median(np.delete(own, 2, axis=0), axis=0)
    assert late.operation.nanoseconds == round(float(np.median(own[2] - others)))


@given(st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=2, max_size=7))
def test_the_median_without_one_is_that_of_the_others(rows):
    values = np.array(rows, np.float64)
    for place in range(len(values)):
        expected = np.median(np.delete(values, place, axis=0), axis=0)
        assert ranks_late.median_without(np.sort(values, axis=0), values[place]).tolist() == expected.tolist()


def test_time_in_which_nothing_was_recorded_is_named_by_what_came_before():
    job = bulk_synchronous(even(2, 12))
    # Rank 1 sleeps 3 ms after its work in each step; rank 0 waits for it.
    for trace, sleeps in zip(job.traces, (False, True), strict=True):
        events = trace.events
        steps, work, calls = (
            np.flatnonzero(events.kind == kind) for kind in (Kind.STEP, Kind.OPERATOR, Kind.COMMUNICATION)
        )
        later = 3 * MS * np.arange(12)
        events.start[steps] += later
        events.start[work] += later
        events.duration[steps] += 3 * MS
        events.start[calls] += later + (3 * MS if sleeps else 0)
        events.duration[calls] += 0 if sleeps else 3 * MS
    (late,) = compare_ranks(job).late
    assert late.rank == 1
    assert (late.operation.name, late.operation.after) == ("", "work")
    assert late.operation.nanoseconds == pytest.approx(3 * MS, rel=0.2)


def test_waiting_while_computing_is_no_waiting():
    """Rank 0 arrives 4 ms early at each all_reduce, but computes on meanwhile, and is needed no earlier."""
    job = bulk_synchronous(np.array([[2 * MS] * 12, [6 * MS] * 12]))
    early = job.traces[0].events
    work = np.flatnonzero(early.kind == Kind.OPERATOR)
    early.duration[work] = 6 * MS
    found = compare_ranks(job)
    assert found.lateness[0].waited_ns == 0
    assert found.late == []


def test_what_threads_wait_for_one_another_is_no_rank_being_late():
    """Rank 1 comes back from each all_reduce 2 ms after it has ended: its thread had no core."""
    resumes, end, rows = (0, 2 * MS), -2 * MS, ([], [])
    for k in range(12):
        begun = [end + late for late in resumes]
        arrival = [at + 5 * MS for at in begun]
        end = max(arrival) + TRANSFER
        for rank, late in enumerate(resumes):
            rows[rank].append((begun[rank], end + late, f"ProfilerStep#{k}", Kind.STEP, MAIN, -1))
            rows[rank].append((begun[rank], arrival[rank], "work", Kind.OPERATOR, MAIN, -1))
            rows[rank].append((arrival[rank], end, "gloo:all_reduce", Kind.COMMUNICATION, BACKEND, 8))
    found = compare_ranks(Job("made", [trace_of(rows[rank], rank, 2) for rank in range(2)]))
    assert found.late == []
    assert [one.handed_ns for one in found.lateness] == [0, 2 * MS]
    assert any("rank 1 loses 2.00 ms a step between its threads" in note for note in ranks_text.notes(found))


# --- skew and transfer -----------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 10**7), min_size=3, max_size=3), min_size=2, max_size=5))
def test_skew_transfer_and_waiting_are_what_they_are_by_definition(own):
    found = compare_ranks(bulk_synchronous(own, host="a", steps=False))
    (row,) = found.collectives
    own = np.array(own)
    waits = own.max(axis=0) - own
    assert row.skew_ns == round(float(np.median(waits.max(axis=0))))
    assert row.transfer_ns == TRANSFER
    assert row.waited_ns == waits.sum()
    assert (row.calls, row.ranks, row.bytes) == (3, len(own), 4000)
    assert row.algorithm_bandwidth == pytest.approx(4000 / (TRANSFER * 1e-9))


def test_the_bus_bandwidth_is_that_of_nccl_tests():
    assert bus_factor("all_reduce", 8) == pytest.approx(1.75)
    assert (
        bus_factor("all_gather", 4) == bus_factor("reduce_scatter", 4) == bus_factor("all_to_all", 4) == 0.75
    )
    assert bus_factor("broadcast", 4) == bus_factor("message 0 to 1", 2) == 1
    assert total_bytes("all_gather", 100, 4) == 400
    assert total_bytes("reduce_scatter", 100, 4) == 100


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "all_reduce"),
        ("ncclKernel_ReduceScatter_RING_LL_Sum_half(ncclWorkElem)", "reduce_scatter"),
        ("ncclKernel_SendRecv_RING_SIMPLE_Sum_int8_t(ncclDevComm*, unsigned long, ncclWork*)", "send_recv"),
        ("nccl:_all_gather_base", "all_gather"),
        ("c10d::alltoall_base_", "all_to_all"),
        ("gloo:reduce", "reduce"),
        ("gloo:recv", "recv"),
        ("void deep_ep::intranode::dispatch<8>(int4*)", "dispatch"),
        ("ncclDevKernel_Generic_4", "ncclDevKernel_Generic_4"),
    ],
)
def test_an_operation_is_known_by_every_name_it_has(name, word):
    assert operation(name) == word


# --- real jobs -------------------------------------------------------------------------------------


def real(name):
    if not (REAL / name).exists():
        pytest.skip(f"the real traces are not beside the project: {REAL / name}")
    return load(REAL / name)


def test_eight_ranks_of_a_real_job():
    found = compare_ranks(real("param_dlrm_8rank_v100"))
    assert found.ranks == list(range(8))
    assert found.missing == []
    calls = Counter()
    for row in found.collectives:
        calls[row.operation] += row.calls
    assert calls == {"all_to_all": 5, "all_reduce": 3}
    largest = max(found.collectives, key=lambda row: row.bytes)
    assert (largest.operation, largest.bytes) == ("all_reduce", 394241 * 4)
    assert 1e9 < largest.bus_bandwidth < 150e9  # NVLink of a V100: 6 links of 25 GB/s
    assert all(clock.how in ("reference", "agrees") and clock.exact < 10_000 for clock in found.clocks)
    assert max(found.lateness, key=lambda one: one.last).rank == 7  # the last to arrive in 5 of 8
    assert "rank 7 may be" in ranks_text.sentence(found)


def test_a_real_job_on_gloo_of_a_cpu():
    found = compare_ranks(real("own_ddp_gloo_cpu_2rank"))
    assert [(row.operation, row.calls, row.bytes) for row in found.collectives] == [
        ("all_reduce", 3, 272256 * 4),
        ("all_reduce", 3, 264064 * 4),
    ]
    assert all(row.bus_bandwidth > 1e8 for row in found.collectives)
