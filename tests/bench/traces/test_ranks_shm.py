"""Ranks of a job over ``parallel.shm`` are compared as those of gloo are; real processes record it."""

import json

import pytest
from shm_job import ELEMENTS, LONG, STEPS, communicate, late

from bench.traces.breakdown import activities
from bench.traces.collectives import match
from bench.traces.events import Kind
from bench.traces.load import load
from bench.traces.ranks import compare_ranks

BYTES = 4 * ELEMENTS


@pytest.fixture(scope="module")
def job(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shm")
    ranks.run(3, communicate, str(folder), backend="shm")
    return folder


def test_every_call_has_its_partners_with_its_bytes_and_its_group(job):
    traces = load(job).traces
    matched = match(traces, [0, 1, 2])
    found = {}
    for key, present in zip(matched.key.tolist(), matched.present, strict=True):
        what = (*matched.keys[key], int(present.sum()))
        found[what] = found.get(what, 0) + 1
    world, pair = ("0 of 3", 3), next(group for _, group, _ in matched.keys if group.endswith("of 2"))
    assert found == {
        ("all_reduce", world[0], BYTES, 3): STEPS,
        ("all_reduce", world[0], 4 * LONG, 3): STEPS,
        ("all_reduce", world[0], 2 * LONG, 3): STEPS,
        ("all_gather", world[0], BYTES, 3): STEPS,  # what a rank brings
        ("reduce_scatter", world[0], 3 * BYTES, 3): STEPS,
        ("broadcast", world[0], BYTES, 3): STEPS,
        ("all_to_all", world[0], 3 * BYTES, 3): STEPS,
        ("barrier", world[0], 0, 3): STEPS,
        ("all_reduce", pair, BYTES, 2): STEPS,
        ("message 0 to 1", world[0], BYTES, 2): STEPS,
    }
    assert not any(matched.unmatched)


def test_no_rank_leaves_a_synchronizing_collective_before_the_last_has_come(job):
    matched = match(load(job).traces, [0, 1, 2])
    rows = matched.synchronizing & matched.present.all(axis=1)
    assert rows.sum() == 7 * STEPS
    came, left = matched.start[rows].max(axis=1), matched.end[rows].min(axis=1)
    assert (left >= came).all()  # of one host: one clock


def test_a_group_does_one_collective_after_the_other_on_a_lane_of_its_own(job):
    for trace in load(job).traces:
        events = trace.events
        rows = events.kind == Kind.COMMUNICATION
        assert all("shm" in trace.lanes[lane].thread for lane in set(events.lane[rows].tolist()))
        assert not any("shm" in trace.lanes[lane].thread for lane in set(events.lane[~rows].tolist()))
        for lane in set(events.lane[rows].tolist()):
            own = events.lane == lane
            assert (events.start[own][1:] >= events.end[own][:-1]).all()
        (host,) = activities(trace)
        assert host.compute.end.size, "operators compute beside what nobody waits for"


def test_every_range_ends_with_its_operation(job):
    """torch marks a range that it had to end itself, at the end of the record."""
    for path in job.glob("*.json"):
        found = [event for event in json.loads(path.read_text())["traceEvents"] if "shm:" in event["name"]]
        assert found
        assert not [event for event in found if event["args"].get("finished") is False]


@pytest.mark.alone
def test_a_rank_that_comes_late_is_named_with_its_operation(ranks, tmp_path):
    # A neighbour on a busy machine may make another rank late too, and truly: then it is tried again.
    def named(folder):
        folder.mkdir()
        ranks.run(3, late, str(folder), 2, backend="shm")
        return [(one.rank, one.operation.name) for one in compare_ranks(load(folder)).late if one.operation]

    assert any(named(tmp_path / str(k)) == [(2, "load batch")] for k in range(3))
