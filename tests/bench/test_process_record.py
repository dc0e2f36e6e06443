"""What is counted of a process beside its profiler."""

import json
import mmap
import resource
import time

import pytest

from bench.profile import process
from bench.profile.process import ProcessRecord, memory_limit


def busy(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def counted(run):
    record = ProcessRecord()
    record.start()
    run()
    return record.stop()


def test_cpu_seconds_and_where_the_main_thread_stood():
    found = counted(lambda: busy(0.2))
    assert 0.19 < found["user_s"] + found["system_s"] < 2.0
    assert found["wall_s"] > 0.19
    where, inner, count = found["places"][0]
    assert where.startswith("busy (test_process_record.py:")
    assert inner == "busy"
    assert count > found["samples"] / 2
    json.dumps(found, allow_nan=False)


def test_a_long_record_keeps_samples_of_all_of_it(monkeypatch):
    monkeypatch.setattr(process, "MOST_SAMPLES", 16)
    found = counted(lambda: time.sleep(0.6))
    times = [row[0] / 1e9 for row in found["series"]]
    assert 4 <= len(times) < 16
    assert times == sorted(times)
    assert times[0] < 0.2
    assert times[-1] > 0.3
    names = dict(zip(found["columns"], found["series"][-1], strict=True))
    assert names["resident_kB"] > 1000
    assert found["places"][names["place"]][0].startswith("<lambda> (test_process_record.py:")


def test_what_came_before_restart_does_not_count():
    record = ProcessRecord()
    record.start()
    busy(0.2)
    record.restart()
    assert record.stop()["user_s"] < 0.1


def test_page_faults_are_those_of_memory_touched_for_the_first_time():
    pages = 2000

    def touch():
        with mmap.mmap(-1, pages * mmap.PAGESIZE) as memory:
            memory.madvise(mmap.MADV_NOHUGEPAGE)  # else one fault would bring many pages
            for page in range(pages):
                memory[page * mmap.PAGESIZE] = 1

    nothing, touched = counted(lambda: None), counted(touch)
    assert touched["minor_faults"] - nothing["minor_faults"] >= 0.9 * pages
    assert touched["resident_peak_B"] > 0


def test_the_limit_of_memory_is_the_least_of_those_there_are():
    before = resource.getrlimit(resource.RLIMIT_RSS)
    whole = memory_limit()
    assert whole > 1 << 26
    try:
        resource.setrlimit(resource.RLIMIT_RSS, (1 << 26, before[1]))
        assert memory_limit() == 1 << 26
    finally:
        resource.setrlimit(resource.RLIMIT_RSS, before)
    assert memory_limit() == whole


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        ("0::/slurm/job_7/step_0", {"slurm/job_7/memory.max": 1 << 26}, 1 << 26),
        ("0::/a/b", {"memory.max": 1 << 27, "a/memory.max": 1 << 26, "a/b/memory.max": 1 << 28}, 1 << 26),
        ("0::/a", {"a/memory.max": "max", "memory.max": 1 << 26}, 1 << 26),
        ("0::/../../x", {"memory.max": 1 << 26}, 1 << 26),  # a container sees no further up
        ("4:cpu,memory:/job\n0::/", {"memory/job/memory.limit_in_bytes": 1 << 26}, 1 << 26),
        ("5:cpu:/job", {"job/memory.max": 1 << 20, "memory/memory.limit_in_bytes": 1 << 26}, 1 << 26),
    ],
)
def test_the_limit_of_memory_is_that_of_the_own_control_group(tmp_path, monkeypatch, own, files, limit):
    (tmp_path / "own").write_text(own)
    for name, value in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{value}\n")
    monkeypatch.setattr(process, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(process, "_GROUPS", tmp_path)
    assert memory_limit() == limit


def test_memory_in_use_leaves_out_what_malloc_keeps_free():
    blocks = [bytes(100_000) for _ in range(300)]  # below malloc's threshold for mapping: on the heap
    full = ProcessRecord()._in_use
    kept = blocks[-1]
    blocks.clear()
    assert full - ProcessRecord()._in_use > 20e6
    assert len(kept) == 100_000  # on top of the heap, which can therefore not shrink
