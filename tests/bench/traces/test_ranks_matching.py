"""What belongs together on ranks: which calls are one collective, whose clock is off, what fits nothing."""

import json

import numpy as np
import pytest
from gloo_table import BACKEND, MAIN, bulk_synchronous, even, trace_of
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.traces import ranks_text
from bench.traces.collectives import match
from bench.traces.events import Job, Kind
from bench.traces.ranks import compare_ranks

MS = 1_000_000
NOISE = np.random.default_rng(1)


# --- clocks ----------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(-(10**9), 10**9), st.integers(0, 2**32 - 1))
def test_a_clock_that_is_off_is_set_right_within_what_is_said(offset, seed):
    random = np.random.default_rng(seed)
    own = random.integers(MS, 9 * MS, (3, 24))
    leaves = random.integers(0, 30_000, (3, 24))
    found = compare_ranks(bulk_synchronous(own, offsets=[0, offset, 0], late_by=leaves))
    clock = found.clocks[1]
    assert abs(clock.offset - offset) <= clock.exact + 15_000  # what the ranks leave apart from one another
    assert clock.exact < 60_000
    assert clock.how in ("aligned", "agrees")


def test_a_clock_that_drifts_is_seen_to():
    own = even(2, 400)
    leaves = NOISE.integers(0, 5_000, own.shape)
    clock = compare_ranks(
        bulk_synchronous(own, offsets=[0, 40 * MS], drifts=[0, 50e-6], late_by=leaves)
    ).clocks[1]
    assert clock.drift == pytest.approx(50e-6, rel=0.05)
    assert "drifts +50" in ranks_text.clock_text(clock).replace("+49", "+50")


def test_who_is_late_does_not_depend_on_clocks():
    own = even(3, 20)
    own[2] += 3 * MS
    for offsets in ([0, 0, 0], [0, 10**9, -(10**8)]):
        assert [one.rank for one in compare_ranks(bulk_synchronous(own, offsets=offsets)).late] == [2]


def test_ranks_of_one_host_share_a_clock():
    found = compare_ranks(bulk_synchronous(even(2, 12), host="a"))
    assert [clock.how for clock in found.clocks] == ["reference", "one host"]


def test_clocks_are_related_through_ranks_that_both_know():
    """Rank 0 and rank 2 share no collective; rank 1 shares one group with each."""

    def rank(number, groups, offset):
        rows = [
            (
                k * MS - offset,
                k * MS + 200_000 - offset,
                "gloo:all_reduce",
                Kind.COMMUNICATION,
                BACKEND,
                8,
                group,
            )
            for group in groups
            for k in range(group * 10 + 1, group * 10 + 10)
        ]
        return trace_of(rows, number, 3, groups=["left of 2", "right of 2"])

    job = Job("made", [rank(0, [0], 0), rank(1, [0, 1], 5 * MS), rank(2, [1], 9 * MS)])
    found = compare_ranks(job)
    assert [clock.offset for clock in found.clocks] == [0, 5 * MS, 9 * MS]
    assert {row.group: row.ranks for row in found.collectives} == {"left of 2": 2, "right of 2": 2}


# --- what does not fit -----------------------------------------------------------------------------


def cut(job, rank, kept):
    """Only those rows of a rank's events whose collective, or step, is among ``kept``."""
    events = job.traces[rank].events
    order = {
        kind: np.flatnonzero(events.kind == kind) for kind in (Kind.STEP, Kind.COMMUNICATION, Kind.OPERATOR)
    }
    rows = np.sort(np.concatenate([rows[kept] for rows in order.values()]))
    job.traces[rank].events = events.select(rows)


def test_a_rank_that_died_is_compared_as_long_as_it_lived():
    own = even(3, 20)
    own[2] += 2 * MS
    job = bulk_synchronous(own)
    cut(job, 1, slice(0, 12))
    found = compare_ranks(job)
    assert [one.rank for one in found.late] == [2]
    assert "rank 1" not in " ".join(found.notes)
    assert (found.matched.row[12:, 1] == -1).all()


def test_a_rank_that_began_to_record_later_is_matched_where_the_times_fit():
    job = bulk_synchronous(even(2, 20))
    cut(job, 1, slice(7, None))
    found = compare_ranks(job)
    assert found.notes == ["rank 0: without a partner on another rank: 7 all_reduce"]
    assert len(found.matched) == 13
    assert found.clocks[1].how == "agrees"  # matched wrongly, the clocks would seem to be 35 ms apart
    assert found.collectives[0].skew_ns < MS


@pytest.mark.parametrize("one_time", [True, False])
def test_a_rank_that_began_hundreds_of_calls_later_is_matched_too(one_time):
    job = bulk_synchronous(np.random.default_rng(3).integers(MS, 9 * MS, (2, 400)))
    cut(job, 1, slice(300, None))
    for trace in job.traces:
        trace.origin_ns *= one_time
    matched = match(job.traces, [0, 1])
    assert matched.unmatched == [{"all_reduce": 300}, {}]
    calls = [np.flatnonzero(trace.events.kind == Kind.COMMUNICATION) for trace in job.traces]
    assert matched.row[:, 0].tolist() == calls[0][300:].tolist()
    assert matched.row[:, 1].tolist() == calls[1].tolist()


def test_calls_of_groups_that_nobody_names_are_not_taken_for_one():
    """Ranks 0 and 1 reduce among themselves, ranks 2 and 3 a while later; gloo does not say in what group."""
    first, second = (bulk_synchronous(even(4, 12), host="a") for _ in range(2))
    for trace in second.traces[2:]:
        trace.origin_ns += 2_000_000_000
    found = compare_ranks(Job("made", first.traces[:2] + second.traces[2:]))
    assert "12 of 12 matched collectives ended on one rank before they began on another" in found.notes[0]
    assert found.collectives == []


def test_messages_between_two_ranks_are_paired_and_among_three_counted():
    def rank(number, way, at):
        rows = [
            (k * MS + at, k * MS + 500_000, f"gloo:{way}", Kind.COMMUNICATION, BACKEND, 64) for k in range(8)
        ]
        return trace_of(rows, number, world, facts={"host": "a"})

    world = 2
    two = compare_ranks(Job("made", [rank(0, "send", 300_000), rank(1, "recv", 0)]))
    (row,) = two.collectives
    assert (row.operation, row.skew_ns, row.calls) == ("message 0 to 1", 300_000, 8)
    world = 3
    three = compare_ranks(Job("made", [rank(0, "send", 0), rank(1, "recv", 0), rank(2, "recv", 0)]))
    assert three.collectives == []
    assert "rank 2: without a partner on another rank: 8 recv (its peer is not recorded)" in three.notes


@pytest.mark.parametrize(("group", "paired"), [("pairs of 2", True), ("all of 4", False), ("", False)])
def test_a_message_is_nobodys_where_its_peer_may_be_a_rank_that_is_not_here(group, paired):
    """Ranks 0 and 3 of four: what 0 sends and what 3 receives may be other messages."""

    def rank(number, way):
        rows = [
            (k * MS, k * MS + 500_000, f"gloo:{way}", Kind.COMMUNICATION, BACKEND, 64, 0 if group else -1)
            for k in range(8)
        ]
        return trace_of(rows, number, 4, groups=[group], facts={"host": "a"})

    found = compare_ranks(Job("made", [rank(0, "send"), rank(3, "recv")]))
    assert [row.operation for row in found.collectives] == ["message 0 to 3"] * paired
    unpaired = "rank 3: without a partner on another rank: 8 recv (its peer is not recorded)"
    assert (unpaired in found.notes) != paired


def test_what_a_kernel_does_not_say_its_launch_does():
    """NCCL runs an all_to_all as SendRecv; older reports have the bytes on the host's annotation alone."""

    def rank(number):
        rows = []
        for k in range(8):
            at = k * MS
            rows.append((at, at + 90_000, "nccl:all_to_all", Kind.ANNOTATION, MAIN, 4096, 0))
            rows.append((at + 10_000, at + 30_000, "cudaLaunchKernel", Kind.RUNTIME, MAIN, -1, -1, k))
            kernel = "ncclKernel_SendRecv_RING_SIMPLE_Sum_int8_t(ncclWork*)"
            rows.append((at + 50_000, at + 400_000, kernel, Kind.COMMUNICATION, BACKEND, -1, -1, k))
        return trace_of(rows, number, 2, groups=["0 (default_pg) of 2"], device=0)

    (row,) = compare_ranks(Job("made", [rank(0), rank(1)])).collectives
    assert (row.operation, row.bytes, row.group) == ("all_to_all", 4096, "0 (default_pg) of 2")


def test_a_message_tells_calls_apart_that_threads_started_in_another_order():
    def rank(number, sizes):
        rows = [
            (k * MS, k * MS + 200_000, "gloo:all_reduce", Kind.COMMUNICATION, BACKEND, size)
            for k, size in enumerate(sizes)
        ]
        return trace_of(rows, number, 2)

    matched = match([rank(0, [8, 16, 8, 16]), rank(1, [16, 8, 8, 16])], [0, 1])
    assert sorted(matched.bytes.tolist()) == [8, 8, 16, 16]
    assert matched.row[matched.bytes == 16].tolist() == [[1, 0], [3, 3]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda traces: traces[:1], "one rank only"),
        (lambda traces: [], "one rank only"),
        (lambda traces: [traces[0], traces[1], traces[1]], "rank 1 is also in rank1.json"),
    ],
)
def test_what_cannot_be_compared_is_said(change, said):
    traces = bulk_synchronous(even(2, 8)).traces
    found = compare_ranks(Job("made", change(traces)))
    assert any(said in note for note in found.notes)
    json.dumps(ranks_text.to_json(found), allow_nan=False)


def test_missing_ranks_files_that_failed_and_reports_without_times_are_said():
    job = bulk_synchronous(even(3, 12))
    job.traces[2].timed = False
    job.failures.append(("rank3.json", "is empty"))
    for trace in job.traces:
        trace.world_size = 4
    notes = ranks_text.notes(compare_ranks(job))
    assert notes[0] == "2 of 4 ranks are not here: 2, 3"
    assert "rank3.json could not be read" in notes
    assert "1 reports have no places in time and are not compared" in notes


def test_ranks_without_a_collective_are_not_compared():
    traces = [trace_of([(0, MS, "work", Kind.OPERATOR, MAIN, -1)], rank, 2) for rank in range(2)]
    found = compare_ranks(Job("made", traces))
    assert "no collective is on two ranks" in ranks_text.sentence(found)


def test_reports_that_do_not_say_their_ranks_are_numbered_in_order():
    job = bulk_synchronous(even(2, 12))
    for trace in job.traces:
        trace.rank = -1
    found = compare_ranks(job)
    assert found.ranks == [0, 1]
    assert "numbered in the order of their names" in found.notes[0]


def test_times_of_traces_without_an_origin_are_related_by_their_collectives_alone():
    own = even(2, 20)
    own[1] += 3 * MS
    job = bulk_synchronous(own)
    for trace in job.traces:
        trace.origin_ns = 0
    assert [one.rank for one in compare_ranks(job).late] == [1]


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_whatever_is_in_the_traces_something_is_said(seed):
    """Slices of all kinds anywhere: compared, and put into words and JSON, without an error or a NaN."""
    random = np.random.default_rng(seed)
    words = ["aten::mm", "gloo:all_reduce", "c10d::allreduce_", "ncclDevKernel_Generic", "gloo:send", ""]
    traces = []
    for rank in range(int(random.integers(1, 4))):
        rows = []
        for _ in range(int(random.integers(1, 40))):
            start, duration = random.integers(0, 1000), random.integers(0, 100)
            name, kind = words[random.integers(len(words))], Kind(random.integers(len(Kind)))
            place = random.integers(2), random.integers(-1, 3), random.integers(-1, 2), random.integers(-1, 3)
            rows.append((start, start + duration, name, kind, *place))
        device, origin = int(random.integers(-1, 1)), int(random.integers(2)) * 10**18
        traces.append(trace_of(rows, rank, 4, groups=["a of 2", "b"], device=device, origin_ns=origin))
    found = compare_ranks(Job("made", traces))
    assert ranks_text.sentence(found)
    for table in ranks_text.tables(found):
        assert all(len(row) == len(table.columns) for row in table.rows)
        assert "nan" not in str(table.rows).lower()
    json.dumps([ranks_text.to_json(found), ranks_text.notes(found)], allow_nan=False)
