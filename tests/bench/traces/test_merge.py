"""One trace of all ranks: nothing of one rank is taken for another's, and all are on one clock."""

import gzip
import json
import tracemalloc
from collections import Counter, defaultdict
from itertools import pairwise

import pytest
from samples import label, slice_, write

from bench.traces.breakdown import activities, whole
from bench.traces.classify import DEVICE_CATEGORIES, category_of, classify
from bench.traces.events import DEVICE_KINDS, Job, Kind
from bench.traces.load import load, read
from bench.traces.merge import merge
from bench.traces.ranks import compare_ranks

OF_DEVICES = (*(Kind.KERNEL, Kind.COPY, Kind.SET, Kind.COMMUNICATION, Kind.ANNOTATION, Kind.SYNCHRONIZATION),)
US_BEHIND = 250_000  # rank 1's clock; a different host, which nothing in the file says


def rank_file(rank, rounds=12, behind=0):
    """A rank with the process, thread, flow and correlation numbers that every rank has: a launch, its kernel
    on stream 7 of device 0, and an all_reduce in which rank 0 waits 30 us for rank 1. Microseconds."""
    events = [
        label("process_name", 100, 0, "python"),
        label("process_name", 0, 0, "python"),
        {"ph": "M", "name": "process_sort_index", "pid": 100, "tid": 0, "args": {"sort_index": 100}},
        {"ph": "M", "name": "process_sort_index", "pid": 0, "tid": 0, "args": {"sort_index": 5_000_000}},
    ]
    for k in range(rounds):
        at = 1_700_000_000_000_000 + 1000 * k - behind
        comes, leaves = at + 100 + 30 * rank, at + 200
        kernel = {"device": 0, "stream": 7}
        nccl = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
        events += [
            slice_("cudaLaunchKernel", "cuda_runtime", 100, 100, at, 5, correlation=k, **{"External id": k}),
            slice_("gemm", "kernel", 0, 7, at + 10, 80, correlation=k, **kernel),
            slice_(nccl, "kernel", 0, 9, comes, leaves - comes, device=0, stream=9),
            {"ph": "s", "id": k, "pid": 100, "tid": 100, "ts": at, "cat": "ac2g", "name": "ac2g"},
            {"ph": "f", "id": k, "pid": 0, "tid": 7, "ts": at + 10, "cat": "ac2g", "name": "ac2g", "bp": "e"},
            {"ph": "i", "s": "g", "name": "mark", "pid": 100, "tid": 100, "ts": at + 1.5},
        ]
    info = {"backend": "nccl", "rank": rank, "world_size": 3}
    return {"schemaVersion": 1, "distributedInfo": info, "traceEvents": events}


@pytest.fixture
def job(tmp_path):
    folder = tmp_path / "job"
    folder.mkdir()
    for rank in range(3):
        text = json.dumps(rank_file(rank, behind=US_BEHIND * (rank == 1)))
        (folder / f"rank{rank}.json").write_text(text)
    return load(folder)


def merged(job, path):
    done = merge(job, compare_ranks(job), path)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:
        document = json.load(file)
    assert done.events == len(document["traceEvents"])
    return document


@pytest.fixture
def events(job, tmp_path):
    return merged(job, tmp_path / "merged.json")["traceEvents"]


def rank_of_processes(events):
    """pid -> rank, as the labels say."""
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    return {pid: int(name.split(":")[0].removeprefix("rank ")) for pid, name in names.items()}


def test_every_process_says_its_rank_and_ranks_stand_in_order(events):
    ranks = rank_of_processes(events)
    assert Counter(ranks.values()) == {0: 2, 1: 2, 2: 2}
    order = {e["pid"]: e["args"]["sort_index"] for e in events if e["name"] == "process_sort_index"}
    in_order = sorted(ranks, key=lambda pid: order[pid])
    assert [ranks[pid] for pid in in_order] == [0, 0, 1, 1, 2, 2]
    devices = {e["pid"] for e in events if e.get("cat") == "kernel"}
    assert [pid in devices for pid in in_order] == [False, True] * 3  # the host above its device


def test_no_number_of_one_rank_is_another_ranks(events):
    ranks = rank_of_processes(events)
    threads, flows, correlations = defaultdict(set), defaultdict(Counter), defaultdict(Counter)
    for event in events:
        rank = ranks[event["pid"]]
        if event["ph"] != "M":
            threads[event["tid"]].add((rank, event["pid"]))
        if event["ph"] in "sf":
            flows[event["id"]][rank, event["ph"]] += 1
        if "correlation" in event.get("args", {}):
            correlations[event["args"]["correlation"]][rank] += 1
    assert all(len(owners) == 1 for owners in threads.values())
    assert len(flows) == 3 * 12
    for ends in flows.values():
        ((rank, _), _), _ = sorted(ends.items())
        assert ends == {(rank, "s"): 1, (rank, "f"): 1}
    assert len(correlations) == 3 * 12
    assert all(sorted(owners.values()) == [2] for owners in correlations.values())


def test_all_ranks_are_on_one_clock(events):
    ranks = rank_of_processes(events)
    ends = defaultdict(list)
    for event in events:
        if event["name"].startswith("nccl"):
            ends[ranks[event["pid"]]].append(event["ts"] + event["dur"])
    for one, other in pairwise(ends.values()):
        assert one == pytest.approx(other, abs=1e-6)
    assert min(e["ts"] for e in events if "ts" in e) == 0


def test_what_was_in_the_files_is_in_the_whole(job, events):
    slices = sum(len(trace.events) for trace in job.traces)
    assert Counter(e["ph"] for e in events)["X"] == slices
    assert sum(e["ph"] == "i" for e in events) == 3 * 12
    gemms = [e for e in events if e["name"] == "gemm"]
    assert {(e["dur"], e["args"]["device"], e["args"]["stream"]) for e in gemms} == {(80, 0, 7)}


def test_a_merged_trace_reads_as_one(job, tmp_path):
    merged(job, tmp_path / "merged.json.gz")
    whole = read(tmp_path / "merged.json.gz")
    assert len(whole.events) == sum(len(trace.events) for trace in job.traces)
    assert whole.origin_ns == 1_700_000_000_000_000_000
    assert {lane.process.split(":")[0] for lane in whole.lanes} == {"rank 0", "rank 1", "rank 2"}


def test_times_keep_their_nanoseconds(tmp_path):
    """Microseconds since 1970 with decimals, which no float64 holds."""
    folder = tmp_path / "job"
    folder.mkdir()
    for rank in range(2):
        text = json.dumps(rank_file(rank)).replace('"ts": 1700000000000010,', '"ts": 1700000000000010.123,')
        (folder / f"rank{rank}.json").write_text(text)
    events = merged(load(folder), tmp_path / "merged.json")["traceEvents"]
    first = min(e["ts"] for e in events if e["name"] == "gemm")
    assert first == pytest.approx(10.123, abs=1e-9)


def test_other_formats_are_written_from_their_tables(tmp_path):
    trace = read(write(tmp_path, "speedscope"))
    document = merged(Job(trace.source, [trace]), tmp_path / "merged.json")
    events = [e for e in document["traceEvents"] if e["ph"] == "X"]
    assert len(events) == len(trace.events)
    assert sum(e["dur"] for e in events) * 1000 == pytest.approx(trace.events.duration.sum())
    assert {e["name"] for e in events} == set(trace.names)


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("on_device", [True, False])
def test_what_is_written_from_a_table_is_read_as_what_it_was(kind, on_device):
    category = category_of(kind, on_device)
    assert classify(category, "name") == kind
    if on_device or kind not in DEVICE_KINDS:
        assert (category in DEVICE_CATEGORIES) == (on_device and kind in OF_DEVICES)


def test_devices_that_each_rank_calls_zero_stay_apart(tmp_path):
    folder = tmp_path / "job"
    folder.mkdir()
    for rank in range(2):
        document = rank_file(rank)
        document["traceEvents"].append(label("process_labels", 0, 0, "GPU 0"))
        (folder / f"rank{rank}.json").write_text(json.dumps(document))
    merged(load(folder), tmp_path / "merged.json")
    units = activities(read(tmp_path / "merged.json"))
    assert [(unit.device, unit.process.split(":")[0]) for unit in units] == [(0, "rank 0"), (0, "rank 1")]
    assert [whole(unit).compute for unit in units] == [12 * 80_000] * 2


def test_the_whole_is_never_in_memory(tmp_path):
    folder = tmp_path / "job"
    folder.mkdir()
    for rank in range(2):
        (folder / f"rank{rank}.json").write_text(json.dumps(rank_file(rank, rounds=2500)))
    size = sum(path.stat().st_size for path in folder.iterdir())
    job = load(folder)
    ranks = compare_ranks(job)
    tracemalloc.start()
    try:
        merge(job, ranks, tmp_path / "merged.json")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size > 4 << 20  # as dictionaries some 30 MiB
    assert peak < 12 << 20


def test_what_cannot_be_written_leaves_nothing(job, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere/merged\.json cannot be written: No such file"):
        merge(job, compare_ranks(job), tmp_path / "nowhere" / "merged.json")
    job.traces[1].source = str(tmp_path / "gone.json")
    ranks = compare_ranks(job)
    with pytest.raises(ValueError, match="gone"):
        merge(job, ranks, tmp_path / "merged.json")
    assert [path.name for path in tmp_path.iterdir()] == ["job"]
