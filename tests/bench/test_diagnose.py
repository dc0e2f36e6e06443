"""``perflab diagnose``: a cause a rule, on facts that are stated, on small reports, and on recorded jobs."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import bottleneck_grid
import pytest
import samples
from command import perflab
from samples import label, memory, slice_

from bench.diagnosis.causes import CAUSES, NONE
from bench.diagnosis.command import headline
from bench.diagnosis.facts import Facts
from bench.diagnosis.verdict import decide, diagnose
from bench.traces.load import load

RECORDED = Path(__file__).parent / "diagnosed_jobs.jsonl"
HEALTHY = Facts(
    steps=5, step_s=0.06, products=0.5, calling=0.08, system=0.05, faults_per_s=2e4, fault_share=0.02,
    threads=1, cores=2, memory=0.1, memory_B=1e8, memory_limit_B=1e9, faster=2.0,
)  # fmt: skip
SICK = {
    "input": {"input": 0.5},
    "python": {"gaps": 0.5},
    "dispatch": {"calling": 0.6},
    "allocator": {"system": 0.4, "fault_share": 0.5},
    "memory_bandwidth": {"pointwise": 0.6},
    "memory_capacity": {"memory": 0.9},
    "compute_precision": {"wide_products": 0.7},
    "transfer_synchronization": {"on_device": True, "waits": 0.4, "calling": 0.0},
    "communication": {"ranks": 2, "exposed": 0.5},
    "straggler": {"ranks": 2, "late": 0.8, "late_rank": 1, "exposed": 0.45},
    "oversubscription": {"threads": 16, "switches_per_s": 6e4, "switch_share": 0.5},
}


# --- rules ----------------------------------------------------------------------------------------


def test_there_is_a_rule_for_each_cause():
    assert set(SICK) == set(CAUSES)


@pytest.mark.parametrize("cause", SICK)
def test_what_is_wrong_alone_is_named(cause):
    found = decide(replace(HEALTHY, **SICK[cause]))
    assert (found.bottleneck, found.sure) == (cause, "clear")
    evidence = found.evidence
    assert evidence.because
    assert len(evidence.attempts) >= 2
    assert headline(found).startswith(f"{cause} (clear)")
    assert json.loads(json.dumps(found.to_json()))["evidence"][0]["gain"] == evidence.gain


def test_a_healthy_job_has_none_and_the_nearest_cause_is_said():
    found = decide(HEALTHY)
    assert (found.bottleneck, found.evidence) == (NONE, None)
    assert found.to_json()["gain"] == 1.0
    assert headline(found) == (
        "no bottleneck (clear): nothing costs 20 % of the time; next: dispatch (8 % of the time)"
    )


def test_the_gain_is_amdahls():
    assert decide(replace(HEALTHY, input=0.75)).evidence.gain == pytest.approx(4.0)


def test_a_full_memory_costs_no_time_and_foretells_no_gain():
    found = decide(replace(HEALTHY, memory=0.99))
    assert (found.bottleneck, found.evidence.gain, found.to_json()["gain"]) == ("memory_capacity", None, None)
    assert headline(found) == (
        "memory_capacity (clear): 99 % of the room in memory; next: dispatch (8 % of the time)"
    )
    beside = headline(decide(replace(HEALTHY, input=0.9, memory=0.8)))
    assert beside.endswith("10.00x faster without it; next: memory_capacity (80 % of the room in memory)")


def test_two_causes_alike_are_called_close_and_the_second_is_kept():
    found = decide(replace(HEALTHY, input=0.40, gaps=0.38))
    assert (found.bottleneck, found.sure, found.second.cause) == ("input", "close", "python")


def test_waiting_for_a_late_rank_is_no_fault_of_communication():
    found = decide(replace(HEALTHY, **SICK["straggler"]))
    share = {one.cause: one.share for one in found.ranked}
    assert share["communication"] == pytest.approx(0.45 - 0.8 / 2)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_equal_shares_save_what_the_others_wait_on_average(ranks):
    """One of n ranks works for 1 s, the others for 0.2: shared out, all work for (1 + 0.2 (n - 1)) / n."""
    waits = 0.8 * (ranks - 1) / ranks
    found = decide(replace(HEALTHY, ranks=ranks, late=0.8, late_rank=1, exposed=waits))
    share = {one.cause: one.share for one in found.ranked}
    assert 1.0 - share["straggler"] == pytest.approx((1.0 + 0.2 * (ranks - 1)) / ranks)
    assert share["communication"] == pytest.approx(0.0, abs=1e-12)


def test_page_faults_cost_what_the_kernel_spent_on_them_and_some_more():
    share = {one.cause: one.share for one in decide(replace(HEALTHY, system=0.3, fault_share=0.2)).ranked}
    assert share["allocator"] == pytest.approx(1.7 * 0.2)
    share = {one.cause: one.share for one in decide(replace(HEALTHY, system=0.1, fault_share=0.2)).ranked}
    assert share["allocator"] == pytest.approx(1.7 * 0.1)


def test_seconds_of_the_kernel_are_not_pythons():
    """Memory that is given back by a call in Python is a gap between operators, too."""
    found = decide(replace(HEALTHY, gaps=0.4, system=0.3, fault_share=0.25))
    share = {one.cause: one.share for one in found.ranked}
    assert share["python"] == pytest.approx(0.4 * 0.7)
    assert found.bottleneck == "allocator"
    device = decide(replace(HEALTHY, gaps=0.4, system=0.3, on_device=True, calling=0.0))
    assert device.evidence.share == pytest.approx(0.4)  # the host's kernel takes nothing of a device's time


def test_what_the_hosts_memory_and_threads_cost_is_no_share_of_a_devices_time():
    sick = SICK["allocator"] | SICK["oversubscription"]
    assert decide(replace(HEALTHY, on_device=True, calling=0.0, **sick)).bottleneck == NONE


def test_a_narrow_type_that_is_no_faster_here_is_not_advised():
    assert decide(replace(HEALTHY, wide_products=0.95, faster=1.29)).bottleneck == NONE
    assert decide(replace(HEALTHY, wide_products=0.95, faster=1.31)).bottleneck == "compute_precision"


def test_products_never_become_as_much_faster_as_matrix_units_are():
    share = [
        decide(replace(HEALTHY, wide_products=0.8, faster=times)).evidence.share for times in (2.0, 15.0)
    ]
    assert share == pytest.approx([0.4, 0.6])


def test_threads_that_seldom_take_turns_are_not_too_many():
    assert decide(replace(HEALTHY, threads=16, switches_per_s=100.0, switch_share=0.01)).bottleneck == NONE
    assert decide(replace(HEALTHY, threads=16, switch_share=None)).evidence.share == pytest.approx(1 - 2 / 16)


def test_without_what_our_recorder_counts_three_causes_cannot_be_seen():
    seen = {one.cause for one in decide(Facts(input=0.3)).ranked}
    assert "input" in seen
    assert not seen & {"allocator", "memory_capacity", "oversubscription", "compute_precision"}


# --- jobs that were recorded ----------------------------------------------------------------------


def wrong_names(rows):
    """(planted, said) of those that differ, counted."""
    said = [(row["planted"], decide(Facts.from_json(row["facts"])).bottleneck) for row in rows]
    return Counter(pair for pair in said if pair[0] != pair[1])


def test_recorded_jobs_that_were_not_tuned_on_are_named_right():
    """Real jobs, fault x seed x size (``bottleneck_grid.py``): nine in ten, and none when healthy."""
    rows = bottleneck_grid.read(RECORDED)
    causes = [NONE, *(cause for cause in CAUSES if cause != "transfer_synchronization")]
    assert Counter(bottleneck_grid.key(row) for row in rows) == Counter(
        (cause, size, seed) for cause in causes for size, seed in bottleneck_grid.PIECES
    )
    wrong = wrong_names(rows)
    assert sum(wrong.values()) <= 0.1 * len(rows), wrong
    assert not [pair for pair in wrong if pair[0] == NONE]


@pytest.mark.proof
@pytest.mark.timeout(3600)
def test_jobs_recorded_now_are_named_right(tmp_path, measured):
    """In a process of its own, whose allocator is that of the lab's column."""
    command = [sys.executable, bottleneck_grid.__file__, str(tmp_path / "rows.jsonl")]
    root = str(Path(__file__).parents[2])
    subprocess.run(command, check=True, timeout=3000, cwd=root, env=os.environ | {"PYTHONPATH": root})
    rows = bottleneck_grid.read(tmp_path / "rows.jsonl")
    wrong = wrong_names(rows)
    print(f"{len(rows) - sum(wrong.values())} of {len(rows)} right; wrong: {dict(wrong)}")
    assert {row["planted"] for row in rows} == set(bottleneck_grid.planted())
    assert sum(wrong.values()) <= 0.1 * len(rows), wrong
    assert not [pair for pair in wrong if pair[0] == NONE]


# --- facts from reports ---------------------------------------------------------------------------

MS = 1000  # microseconds


def report(folder, events, **document):
    """A report of PyTorch of two steps of 10 ms on thread 1, with these events of a step, (name, category,
    start in ms, length in ms)."""
    slices = [label("thread_name", 1, 1, "thread 1 (python)")]
    for number in range(2):
        begin = number * 10 * MS
        slices.append(slice_(f"ProfilerStep#{number}", "user_annotation", 1, 1, begin, 10 * MS))
        slices += [
            slice_(name, category, 1, 1, begin + start * MS, length * MS, **more)
            for name, category, start, length, more in events
        ]
    path = folder / "report.json"
    path.write_text(json.dumps({"schemaVersion": 1, "traceEvents": slices, **document}))
    return path


PRODUCT = {"Input Dims": [[100, 100], [100, 100]], "Input type": ["float", "float"]}
LOADER = "enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__"


def test_shares_of_a_hosts_time(tmp_path):
    """4 of 10 ms wait for input, 2 multiply in float32, 1 adds, the rest is a gap."""
    events = [
        (LOADER, "user_annotation", 0, 4, {}),
        ("aten::mm", "cpu_op", 4, 2, PRODUCT),
        ("aten::add", "cpu_op", 6, 1, {}),
    ]
    found = diagnose(load(report(tmp_path, events)))
    facts = found.facts
    assert (facts.input, facts.products, facts.wide_products, facts.pointwise, facts.gaps) == pytest.approx(
        (0.4, 0.2, 0.2, 0.1, 0.3)
    )
    assert facts.step_s == pytest.approx(0.010)
    assert facts.flops_per_s == pytest.approx(2 * 100**3 / 2e-3)
    assert found.bottleneck == "input"


def test_steps_in_which_no_operation_was_recorded_are_looked_at_all_the_same(tmp_path):
    """None is complete: what can be said is said of all of them, not that all is well."""
    found = diagnose(load(report(tmp_path, [(LOADER, "user_annotation", 0, 7, {})])))
    assert (found.facts.steps, found.facts.step_s) == (2, pytest.approx(0.010))
    assert (found.facts.input, found.bottleneck) == (pytest.approx(0.7), "input")


def test_a_folder_called_dataloader_makes_nothing_input(tmp_path):
    """A stack of Python: the program's own file lies in it, and its loop is called like a loader."""
    path = report(tmp_path, [("aten::mm", "cpu_op", 1, 2, PRODUCT)])
    text = json.loads(path.read_text())
    stack = [("/home/me/dataloader/train.py(3): main", 0, 20), ("train.py(9): run_dataloader_loop", 0, 20)]
    stack += [("/home/me/dataloader/train.py(12): log", 4, 5)]
    stack += [("torch/utils/data/dataloader.py(701): __next__", 10, 1)]
    text["traceEvents"] += [
        slice_(name, "python_function", 1, 1, start * MS, length * MS) for name, start, length in stack
    ]
    path.write_text(json.dumps(text))
    found = diagnose(load(path))
    assert (found.facts.input, found.bottleneck) == (pytest.approx(1 / 20), "python")


def test_what_threads_do_at_once_is_a_share_of_the_time(tmp_path):
    """Two threads add for 9 of 10 ms at once: that is nine tenths of the time, not eighteen."""
    path = report(tmp_path, [("aten::add", "cpu_op", 0, 9, {})])
    text = json.loads(path.read_text())
    text["traceEvents"] += [slice_("aten::add", "cpu_op", 1, 2, 10 * MS * step, 9 * MS) for step in range(2)]
    path.write_text(json.dumps(text))
    found = diagnose(load(path))
    assert found.facts.pointwise == pytest.approx(0.9)
    assert found.evidence.share == pytest.approx(0.9 * 0.8)


def test_types_of_products_are_told_apart(tmp_path):
    half = PRODUCT | {"Input type": ["Scalar", "c10::BFloat16"]}
    events = [("aten::mm", "cpu_op", 0, 6, half), ("aten::mm", "cpu_op", 6, 2, PRODUCT)]
    facts = diagnose(load(report(tmp_path, events))).facts
    assert (facts.products, facts.wide_products) == pytest.approx((0.8, 0.2))


def test_a_report_of_another_profiler_says_what_cannot_be_seen(tmp_path):
    found = diagnose(load(report(tmp_path, [("aten::mm", "cpu_op", 0, 9, PRODUCT)])))
    assert found.bottleneck == NONE
    assert [text.split(":")[0] for text in found.facts.lacks] == [
        "page faults, context switches, threads and the memory limit",
        "this machine's limits",
    ]


COUNTED = {
    "wall_s": 0.02, "user_s": 0.01, "system_s": 0.01, "minor_faults": 1000, "involuntary_switches": 3,
    "voluntary_switches": 3, "compute_threads": 1, "cores": 2,
    "memory_limit_B": 1_000_000, "in_use_at_start_B": 200_000,
    "load_average": 0.5,
}  # fmt: skip


def test_what_our_recorder_counts_is_read_from_the_same_file(tmp_path):
    path = report(tmp_path, [("aten::mm", "cpu_op", 0, 9, PRODUCT)], perflab=COUNTED)
    text = json.loads(path.read_text())
    text["traceEvents"] += [memory(1, 100, 0, 0), memory(5 * MS, 720_100, 0, 0)]
    path.write_text(json.dumps(text))
    found = diagnose(load(path))
    assert (found.facts.system, found.facts.faults_per_s) == pytest.approx((0.5, 50_000))
    assert found.facts.memory == pytest.approx(0.9)
    assert {one.cause for one in found.ranked[:2]} == {"allocator", "memory_capacity"}


SECOND = 1_000_000_000


def test_what_a_program_did_before_its_steps_is_not_their_share(tmp_path):
    """60 s of download in Python that hardly computes; then two steps of 10 ms, busy on the CPU, which fault
    in 30 pages each and multiply."""
    path = report(tmp_path, [("aten::mm", "cpu_op", 0, 9, PRODUCT)])
    text = json.loads(path.read_text())
    columns = ["time_ns", "user_us", "system_us", "minor_faults", "voluntary_switches"]
    columns += ["involuntary_switches", "resident_kB", "place"]
    before = [[second * SECOND, 1000 * second, 0, 1000 * second, 0, 0, 9_000_000, 0] for second in range(60)]
    steps = [
        [60 * SECOND + 1_000_000 * ms, 59_000 + 900 * ms, 100 * ms, 59_000 + 3 * ms, 0, 0, 400_000, 1]
        for ms in range(22)
    ]
    stood = [["load (a.py:1)", "x", 60], ["b", "y", 22]]
    counted = COUNTED | {"wall_s": 60.0, "samples": 82, "places": stood}
    counted |= {"start_ns": 1_000 * SECOND, "columns": columns, "series": before + steps}
    text |= {"perflab": counted, "baseTimeNanoseconds": 1_060 * SECOND}
    path.write_text(json.dumps(text))
    facts = diagnose(load(path)).facts
    assert facts.system == pytest.approx(0.1, rel=0.01)
    assert facts.faults_per_s == pytest.approx(3000, rel=0.01)
    assert facts.calling == pytest.approx(2 * 1300 / 20e6, rel=0.02)
    assert facts.places == "b 100 %"
    assert (facts.memory_B, facts.memory_grown) == (pytest.approx(1024 * 400_000 - 200_000), True)
    assert "the process grew by" in str([one.because for one in decide(facts).ranked])


@pytest.mark.parametrize(
    "damaged",
    [
        {"series": 3},
        {"series": [[1, 2], [3]]},
        {"series": [["x"] * 8] * 3},
        {"series": [[10**400] * 8] * 3},
        {"series": [[0] * 8] * 3},
        {"columns": ["time_ns"]},
        {"start_ns": 10**30},
    ],
)
def test_a_damaged_series_counts_as_absent(tmp_path, damaged):
    columns = ["time_ns", "user_us", "system_us", "minor_faults", "voluntary_switches"]
    columns += ["involuntary_switches", "resident_kB", "place"]
    series = [[1_000_000 * ms, 1000 * ms, 0, 0, 0, 0, 1, 0] for ms in range(20)]
    counted = COUNTED | {"start_ns": SECOND, "columns": columns, "series": series} | damaged
    path = report(tmp_path, [("aten::mm", "cpu_op", 0, 9, PRODUCT)], perflab=counted)
    text = json.loads(path.read_text()) | {"baseTimeNanoseconds": SECOND}
    path.write_text(json.dumps(text))
    assert diagnose(load(path)).facts.system == pytest.approx(0.5)


def test_of_several_ranks_the_fullest_counts_and_threads_add_up(tmp_path):
    """Rank 1 allocates less but has less room: 300 of 400 kB against 400 of 800."""
    for rank, (taken, limit) in enumerate(((400_000, 1_000_000), (300_000, 600_000))):
        counted = COUNTED | {"memory_limit_B": limit}
        folder = tmp_path / f"rank{rank}"
        folder.mkdir()
        path = report(folder, [("aten::mm", "cpu_op", 0, 9, PRODUCT)], perflab=counted)
        text = json.loads(path.read_text())
        text["traceEvents"] += [memory(1, 0, 0, 0), memory(5 * MS, taken, 0, 0)]
        (tmp_path / f"rank{rank}.json").write_text(json.dumps(text))
    facts = diagnose(load(tmp_path)).facts
    assert (facts.ranks, facts.threads, facts.cores) == (2, 2, 2)
    assert (facts.memory, facts.memory_B) == pytest.approx((0.75, 300_000))


def test_what_one_rank_waits_more_than_another_is_the_others_lateness(tmp_path):
    """Both exchange for 1 ms; rank 0 has computed for 3 ms and waits 5 more, rank 1 computes for 8."""
    for rank, busy in enumerate((3, 8)):
        folder = tmp_path / f"rank{rank}"
        folder.mkdir()
        waits = ("c10d::allreduce_", "cpu_op", busy, 9 - busy, {})
        text = json.loads(report(folder, [("aten::mm", "cpu_op", 0, busy, PRODUCT), waits]).read_text())
        text["traceEvents"] += [
            slice_("gloo:all_reduce", "user_annotation", 1, 2, (10 * step + busy) * MS, (9 - busy) * MS)
            for step in range(2)
        ]
        (tmp_path / f"rank{rank}.json").write_text(json.dumps(text))
    found = diagnose(load(tmp_path))
    assert (found.facts.late, found.facts.late_rank) == (pytest.approx(0.5), 1)
    assert found.facts.exposed == pytest.approx((0.6 + 0.1) / 2)
    assert found.bottleneck == "straggler"


@pytest.mark.parametrize(
    "damaged", [[], 3, {"wall_s": "x"}, COUNTED | {"user_s": None}, COUNTED | {"cores": {}}]
)
def test_a_damaged_entry_counts_as_absent(tmp_path, damaged):
    found = diagnose(load(report(tmp_path, [("aten::mm", "cpu_op", 0, 9, PRODUCT)], perflab=damaged)))
    assert found.facts.threads is None
    assert found.facts.lacks


def test_a_device_that_waits_because_the_host_waited_for_it(tmp_path):
    """Two kernels of 2 ms of which the second is launched after the host has waited 5 ms: 5 of 9 ms."""
    on_device = {"device": 0, "stream": 7}
    launch = [
        slice_("cudaLaunchKernel", "cuda_runtime", 1, 1, start, 10, correlation=number)
        for number, start in ((1, 0), (2, 7 * MS))
    ]
    kernels = [
        slice_("gemm", "kernel", 0, 7, start, 2 * MS, correlation=number, **on_device)
        for number, start in ((1, 20), (2, 7 * MS + 20))
    ]
    wait = slice_("cudaDeviceSynchronize", "cuda_runtime", 1, 1, 20, 6970)
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"schemaVersion": 1, "traceEvents": [*launch, *kernels, wait]}))
    found = diagnose(load(path))
    assert found.facts.on_device
    assert found.bottleneck == "transfer_synchronization"
    assert found.facts.waits == pytest.approx(4.98 / 9, abs=0.01)


def on_device(folder, names, types=("c10::BFloat16",)):
    """A step of 10 ms in which an operator of each name, 10 us long on the host, launches a kernel of 2 ms;
    the device was idle for a second before it, waiting for the host to read."""
    slices = [
        label("thread_name", 1, 1, "thread 1 (python)"),
        slice_(LOADER, "user_annotation", 1, 1, 0, 1000 * MS),
        slice_("ProfilerStep#0", "user_annotation", 1, 1, 1000 * MS, 10 * MS),
        slice_("gemm", "kernel", 0, 7, 100, 10, correlation=99, device=0, stream=7),
    ]
    for number, name in enumerate(names):
        start = 1000 * MS + 20 * number
        more = {}
        if name == "aten::mm":
            given = types[number % len(types)]
            more = {"Input Dims": [[1000, 1000], [1000, 1000]], "Input type": [given, given]}
        slices += [
            slice_(name, "cpu_op", 1, 1, start, 15, **more),
            slice_("cudaLaunchKernel", "cuda_runtime", 1, 1, start + 1, 5, correlation=number),
            slice_(
                *("kernel", "kernel", 0, 7, 1000 * MS + 40 + 2 * MS * number, 2 * MS),
                correlation=number, device=0, stream=7,
            ),
        ]  # fmt: skip
    path = folder / "gpu.json"
    path.write_text(json.dumps({"schemaVersion": 1, "traceEvents": slices, "perflab": COUNTED}))
    return diagnose(load(path)).facts


def test_on_a_device_an_operator_takes_what_its_kernels_take(tmp_path):
    facts = on_device(tmp_path, ["aten::mm", "aten::add", "aten::add"])
    assert (facts.products, facts.pointwise) == pytest.approx((0.2, 0.4), abs=0.001)
    assert facts.flops_per_s == pytest.approx(2 * 1000**3 / 2e-3)
    assert facts.wide_products == 0.0
    assert (facts.threads, facts.memory) == (1, None)
    assert any(text.startswith("a device's memory") for text in facts.lacks)
    assert not any("which type" in text for text in facts.lacks)


def test_why_a_device_waited_before_the_steps_is_no_matter(tmp_path):
    facts = on_device(tmp_path, ["aten::mm"] * 4)
    assert facts.input == 0.0
    assert facts.launches == pytest.approx(0.004, abs=0.001)


def test_of_products_of_several_types_a_devices_shares_are_not_known(tmp_path):
    facts = on_device(tmp_path, ["aten::mm"] * 4, types=("float", "c10::BFloat16"))
    assert (facts.products, facts.wide_products) == (pytest.approx(0.8, abs=0.001), 0.0)
    assert any("which type" in text for text in facts.lacks)
    alone = on_device(tmp_path, ["aten::mm"] * 4, types=("float",))
    assert alone.wide_products == pytest.approx(0.8, abs=0.001)


def test_a_report_without_places_in_time_is_refused(tmp_path):
    path = samples.write(tmp_path, "cprofile")
    with pytest.raises(ValueError, match="says how long functions took but not when"):
        diagnose(load(path))


NAMED = {  # and the share of the costliest cause, as what samples.py says of the file
    "kineto": ("communication", "communication", 0.30),  # 30 of 100 us nothing computes beside the all-reduce
    "kineto zipped": ("communication", "communication", 0.30),
    "kineto old": ("dispatch", "dispatch", 8 / 28),  # the first kernel starts after 8 of 28 us
    "kineto gloo": (NONE, "communication", 8.875 / 100.5),
    "jax json": ("python", "python", 28 / 90),  # of the trace's 80 us the device works for a part
    "xplane": (NONE, "dispatch", 1.3 / 80),  # one call of an operator
    "nsys": ("dispatch", "dispatch", 0.35),
    "speedscope": (NONE, None, 0.0),
    "py-spy": (NONE, None, 0.0),
    "viztracer": (NONE, None, 0.0),
}


def test_every_kind_of_report_with_a_timeline_is_diagnosed_below():
    assert set(samples.SAMPLES) - set(NAMED) == {"cprofile"}


@pytest.mark.parametrize("name", NAMED)
def test_every_kind_of_report_with_a_timeline_is_diagnosed(tmp_path, name):
    bottleneck, cause, share = NAMED[name]
    found = diagnose(load(samples.write(tmp_path, name)))
    assert found.bottleneck == bottleneck
    assert found.ranked[0].share == pytest.approx(share, abs=1e-3)
    assert cause in (None, found.ranked[0].cause)
    functions_alone = any(text.startswith("operations: ") for text in found.facts.lacks)
    assert functions_alone == (cause is None)
    json.dumps(found.to_json(), allow_nan=False)


# --- the command ----------------------------------------------------------------------------------


def test_the_command_reads_a_report_and_results(tmp_path, run):
    path = report(tmp_path, [(LOADER, "user_annotation", 0, 7, {}), ("aten::mm", "cpu_op", 7, 3, PRODUCT)])
    status, out, err = run("diagnose", path)
    assert status == 0, err
    assert "input (clear): 70 % of the time, about 3.33x faster without it" in out
    assert "try     read ahead" in out
    status, out, _ = run("diagnose", path, "--json")
    found = json.loads(out)
    assert (found["bottleneck"], found["sure"]) == ("input", "clear")
    results = {
        "fullname": "x",
        "stats": {},
        "extra_info": {"lab": "mine", "variant": "a/b", "diagnosis": found},
    }
    (tmp_path / "results.json").write_text(json.dumps({"benchmarks": [results]}))
    status, out, err = run("diagnose", tmp_path / "results.json")
    assert (status, out.split(":")[:2]) == (0, ["mine", "a/b"]), err
    assert "input (clear)" in out
    assert "because 70 % of the time the loop waits" in out
    assert "try     read ahead" in out


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_a_rank_that_cannot_be_read_fails_the_command(tmp_path, run, form):
    for rank in range(2):
        path = report(tmp_path, [("aten::mm", "cpu_op", 0, 9, PRODUCT)])
        path.rename(tmp_path / f"rank{rank}.json")
    (tmp_path / "rank1.json").write_text('{"traceEvents": [')
    status, out, err = run("diagnose", tmp_path, *form)
    assert status == 1
    assert out
    (line,) = err.splitlines()
    assert line.startswith("perflab: ")
    assert "rank1.json" in line


def test_reading_a_report_imports_nothing_heavy(tmp_path):
    report(tmp_path, [("aten::mm", "cpu_op", 0, 9, PRODUCT)])
    probe = (
        "import sys\nfrom bench import cli\nsys.argv = ['perflab', 'diagnose', 'report.json']\n"
        "try:\n    cli.main()\nfinally:\n"
        "    assert not {'torch', 'jax', 'numba', 'ray', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing.json"], "there is no file or folder nothing.json"),
        (["plain.json"], "plain.json holds no diagnosis: none of its variants was profiled"),
        (["a", "b"], "a program comes after --: perflab diagnose -- a b"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(tmp_path, arguments, said, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.json").write_text(json.dumps({"benchmarks": []}))
    status, out, err = run("diagnose", *arguments)
    assert (status, out) == (2, "")
    assert said in err
    assert len(err.strip().splitlines()) == 1


def test_a_program_is_run_profiled_and_diagnosed(tmp_path):
    """Python between the operators; three calls of an optimizer or more mark its steps."""
    (tmp_path / "train.py").write_text(
        "import torch\n"
        "model = torch.nn.Linear(8, 8)\n"
        "optimizer = torch.optim.SGD(model.parameters(), 0.1)\n"
        "for step in range(6):\n"
        "    optimizer.zero_grad()\n"
        "    model(torch.ones(4, 8)).sum().backward()\n"
        "    optimizer.step()\n"
        "    total = 0\n"
        "    for number in range(400_000):\n"
        "        total += number\n"
        "print('{trained}')\n"
    )
    status, out, err = perflab("diagnose", "--json", "--", sys.executable, "train.py", folder=tmp_path)
    assert status == 0, err
    found = json.loads(out)  # what the program prints is elsewhere
    assert "{trained}" in err
    assert found["bottleneck"] == "python", found
    assert "train.py:" in found["evidence"][0]["because"][0]
    assert not list(tmp_path.glob("profile*"))
