"""Each reader against a small file of its format, of which samples.py says what stands in it."""

import cProfile
import json
import marshal
import sqlite3
import sys

import numpy as np
import pytest
import samples

from bench.traces import analysis_text
from bench.traces.breakdown import activities
from bench.traces.diff import difference
from bench.traces.events import Kind
from bench.traces.job_report import examine, to_json
from bench.traces.load import load
from bench.traces.markdown import to_markdown
from bench.traces.page import render_trace_page


def read(folder, name):
    (trace,) = load(samples.write(folder, name)).traces
    return trace


def rows(trace, kind):
    """(name, start, duration) of the slices of a kind, in microseconds."""
    events = trace.events
    return [
        (trace.names[events.name[row]], events.start[row] / 1000, events.duration[row] / 1000)
        for row in np.flatnonzero(events.kind == kind)
    ]


def counted(trace):
    return {Kind(kind).name: int(count) for kind, count in enumerate(np.bincount(trace.events.kind)) if count}


@pytest.mark.parametrize("name", ["kineto", "kineto zipped"])
def test_kineto_of_a_gpu(tmp_path, name):
    trace = read(tmp_path, name)
    assert (trace.format, trace.rank, trace.world_size, trace.backend) == ("kineto", 0, 2, "nccl")
    assert counted(trace) == {
        **{"OPERATOR": 4, "RUNTIME": 8, "SYNCHRONIZATION": 2, "KERNEL": 4, "COPY": 2, "COMMUNICATION": 2},
        **{"ANNOTATION": 2, "STEP": 2},
    }
    assert rows(trace, Kind.STEP) == [("ProfilerStep#0", 0, 100), ("ProfilerStep#1", 100, 100)]
    assert rows(trace, Kind.KERNEL)[:2] == [("ampere_sgemm_32x32", 10, 30), ("relu_kernel", 40, 20)]
    assert trace.origin_ns == samples.EPOCH_US * 1000
    lanes = {(lane.process, lane.thread, lane.device) for lane in trace.lanes}
    assert lanes == {
        ("python3 100", "thread 100 (python3)", -1),
        ("GPU 0", "stream 7", 0),
        ("GPU 0", "stream 9", 0),
    }
    assert trace.facts["device"] == "NVIDIA H100 80GB HBM3"
    assert trace.dropped == {"flow arrows": 4, "spans of the profiler itself (category Trace)": 1}
    assert not trace.unclassified


def test_kineto_says_what_launched_a_kernel_and_how_many_bytes_move(tmp_path):
    trace = read(tmp_path, "kineto")
    events = trace.events
    kernels = events.correlation[events.kind == Kind.KERNEL]
    assert set(kernels) <= set(events.correlation[events.kind == Kind.RUNTIME])
    collective = events.select(events.kind == Kind.COMMUNICATION)
    assert collective.bytes.tolist() == [4000, 4000]  # 1000 float32
    assert [trace.groups[group] for group in collective.group] == ["0 (default_pg) of 2"] * 2
    assert events.bytes[events.kind == Kind.COPY].tolist() == [4096, 4096]
    assert (events.bytes[events.kind == Kind.KERNEL] == -1).all()
    product = events.select(np.array([trace.names[name] == "aten::mm" for name in events.name]))
    assert {trace.shapes[shape] for shape in product.shape} == {"[[64, 32], [32, 16]]"}
    assert product.flops.tolist() == [2 * 64 * 32 * 16] * 2


def test_kineto_samples_of_memory(tmp_path):
    memory = read(tmp_path, "kineto").memory
    assert memory.time.tolist() == [5_000, 105_000]
    assert (memory.allocated.tolist(), memory.device.tolist()) == ([1000, 2000], [0, 0])


def test_old_categories_and_threads_in_strings(tmp_path):
    trace = read(tmp_path, "kineto old")
    assert counted(trace) == {"OPERATOR": 1, "RUNTIME": 1, "KERNEL": 1}
    assert [lane.on_device for lane in trace.lanes] == [False, True]
    assert trace.memory.allocated.tolist() == [64, 128]  # without totals: counted from the first sample on


def test_a_thread_is_the_same_as_a_number_and_in_a_string(tmp_path):
    events = [samples.slice_("a", "cpu_op", 1, thread, 5, 3) for thread in (7, "7")]
    events.append(samples.label("thread_name", "1", 7, "worker"))
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"traceEvents": events}))
    trace = load(path).traces[0]
    assert [lane.thread for lane in trace.lanes] == ["worker"]
    assert trace.events.lane.tolist() == [0, 0]


def test_gloo_on_cpus_is_communication_with_bytes_and_nanoseconds(tmp_path):
    trace = read(tmp_path, "kineto gloo")
    assert rows(trace, Kind.COMMUNICATION) == [("gloo:all_reduce", 39.75, 30.0)]
    assert trace.events.bytes[trace.events.kind == Kind.COMMUNICATION].tolist() == [1000]
    assert rows(trace, Kind.OPERATOR) == [("aten::addmm", 0.75, 60.125)]
    assert trace.origin_ns == 1_790_857_026_001_000_250
    assert not trace.on_device().any()


def test_jax_json_by_names_and_lines(tmp_path):
    trace = read(tmp_path, "jax json")
    assert trace.format == "jax"
    assert rows(trace, Kind.STEP) == [("train", 0, 90)]
    assert rows(trace, Kind.OPERATOR) == [("dot.1", 8.5, 20)]
    assert [name for name, *_ in rows(trace, Kind.COMMUNICATION)] == ["ncclDevKernel_AllReduce"]
    assert [name for name, *_ in rows(trace, Kind.COPY)] == ["MemcpyD2H"]
    assert [name for name, *_ in rows(trace, Kind.ANNOTATION)] == ["jit_f(1)"]  # drawn over its kernels
    assert [name for name, *_ in rows(trace, Kind.WAIT)] == ["ThunkExecutor::Execute (wait for completion)"]


def test_xplane(tmp_path):
    trace = read(tmp_path, "xplane")
    assert trace.format == "jax"
    assert rows(trace, Kind.STEP) == [("train", 0, 80)]
    assert rows(trace, Kind.RUNTIME) == [("PjitFunction(f)", 10, 50)]
    assert rows(trace, Kind.OPERATOR) == [("dot.1", 20, 20)]
    assert [(lane.process, lane.thread) for lane in trace.lanes] == [("/host:CPU", "python")]


def test_nsys(tmp_path):
    trace = read(tmp_path, "nsys")
    assert rows(trace, Kind.STEP) == [("step 4", 0, 100)]
    assert rows(trace, Kind.KERNEL) == [("void gemm<float>(int)", 19, 40)]
    assert rows(trace, Kind.COPY) == [("Memcpy DtoH", 59, 5)]
    assert rows(trace, Kind.RUNTIME) == [("cudaLaunchKernel", 9, 5)]
    assert rows(trace, Kind.SYNCHRONIZATION) == [("cudaStreamSynchronize", 69, 20)]
    assert rows(trace, Kind.WAIT) == [("pthread_cond_wait", 1, 2)]
    events = trace.events
    assert set(events.correlation[events.kind == Kind.KERNEL]) == set(
        events.correlation[events.kind == Kind.RUNTIME]
    )
    assert trace.memory.allocated.tolist() == [1000, 600]
    assert trace.origin_ns == samples.EPOCH_US * 1000 + 1000
    assert trace.dropped == {
        "rows of NVTX_EVENTS without a start and an end (marks)": 1,
        "rows of SCHED_EVENTS": 2,
        "samples of memory that is no device's": 1,
    }


def test_cprofile_keeps_calls_and_own_time_without_a_place_in_time(tmp_path):
    trace = read(tmp_path, "cprofile")
    assert not trace.timed
    assert not trace.nested
    calls = dict(
        zip((trace.names[name] for name in trace.events.name), trace.events.calls.tolist(), strict=True)
    )
    (slow,) = [name for name in calls if name.startswith("_slow (traces/samples.py:")]
    assert calls[slow] == 3
    assert trace.events.duration.sum() > 0


def _factorial(number):
    return number * _factorial(number - 1) if number else 1


def test_cprofile_counts_calls_within_a_function_itself(tmp_path):
    profile = cProfile.Profile()
    profile.runcall(_factorial, 4)
    profile.dump_stats(tmp_path / "a.prof")
    (trace,) = load(tmp_path / "a.prof").traces
    called = {
        trace.names[name]: calls for name, calls in zip(trace.events.name, trace.events.calls, strict=True)
    }
    assert [calls for name, calls in called.items() if name.startswith("_factorial")] == [5]


def test_cprofile_leaves_out_and_counts_what_is_no_function(tmp_path):
    good = {("a.py", 3, "good"): (1, 1, 0.5, 0.5, {})}
    bad = {("a.py", 1, "f"): (1, 1, -1.0, 0, {}), ("a.py", 2, "f"): (1, 1, float("nan"), 0, {}), "no key": 5}
    path = tmp_path / "a.prof"
    path.write_bytes(marshal.dumps(good | bad))
    (trace,) = load(path).traces
    assert trace.names == ["good (a.py:3)"]
    assert trace.events.duration.tolist() == [500_000_000]
    assert trace.dropped == {"entries that are no function's, or of no possible time": 3}


def test_a_profile_that_crashes_or_fills_memory_takes_nothing_with_it(tmp_path):
    """A list of two thousand million elements, of which the file has none: marshal would allocate them."""
    path = tmp_path / "a.prof"
    path.write_bytes(b"{" + b"(" + (2**31 - 1).to_bytes(4, "little") + b"N" * 100)
    with pytest.raises(ValueError, match=r"a\.prof is not a profile of cProfile: \w+"):
        load(path)


def test_speedscope_sampled_and_evented(tmp_path):
    trace = read(tmp_path, "speedscope")
    assert rows(trace, Kind.FUNCTION) == [
        ("main (a.py:3)", 0, 30_000),
        ("work", 0, 20_000),
        ("main (a.py:3)", 0, 9),
    ]
    assert rows(trace, Kind.WAIT) == [("wait (threading.py:5)", 2, 3)]
    assert [lane.thread for lane in trace.lanes] == ["sampled", "evented"]


def speedscope(folder, *profiles):
    """A file of these profiles, with frames f, g and h."""
    schema = "https://www.speedscope.app/file-format-schema.json"
    shared = {"frames": [{"name": name} for name in "fgh"]}
    path = folder / "profile.json"
    path.write_text(json.dumps({"$schema": schema, "shared": shared, "profiles": list(profiles)}))
    return path


def evented(unit, begin, *marks):
    events = [{"type": kind, "frame": frame, "at": at} for kind, frame, at in marks]
    return {
        "type": "evented",
        "name": "t",
        "unit": unit,
        "startValue": begin,
        "endValue": 0,
        "events": events,
    }


def sampled(unit, begin=0):
    """f for 30, in it g for 20, in that h for 5."""
    stacks, weights = [[0, 1], [0, 1, 2], [0]], [15, 5, 10]
    shape = {"type": "sampled", "name": "s", "unit": unit, "startValue": begin, "endValue": begin + 30}
    return shape | {"samples": stacks, "weights": weights}


def test_threads_of_speedscope_keep_their_distance(tmp_path):
    first, second = ("O", 0, 1_000_100), ("C", 0, 1_000_109)
    late = evented("microseconds", 1_000_020, ("O", 2, 1_000_120), ("C", 2, 1_000_125))
    path = speedscope(
        tmp_path, evented("microseconds", 1_000_000, first, second), late, sampled("milliseconds", 1000.5)
    )
    (trace,) = load(path).traces
    assert rows(trace, Kind.FUNCTION) == [
        ("f", 0, 9),
        ("h", 20, 5),
        ("f", 400, 30_000),
        ("g", 400, 20_000),
        ("h", 15_400, 5_000),
    ]


def test_what_speedscope_counts_beside_time_nests_and_keeps_its_unit(tmp_path):
    path = speedscope(tmp_path, sampled("bytes"))
    (trace,) = load(path).traces
    assert (trace.timed, trace.nested, trace.unit) == (False, True, "bytes")
    (one,) = (report := examine(load(path))).analyses
    assert {operation.name: operation.self_time for operation in one.operations} == {"f": 10, "g": 15, "h": 5}
    assert analysis_text.sentence(one) == "30 B in 3 operations, most in g: 50.0 % of it"
    assert to_json(report)["traces"][0]["unit"] == "bytes"
    text = to_markdown(report, 10)
    assert "15 B" in text
    assert " ns" not in text
    page = render_trace_page(load(path))
    assert '"unit":"bytes"' in page
    assert "15 ns" not in page
    with pytest.raises(ValueError, match="counts in bytes, which is no time to compare"):
        difference(load(path), load(path))


def test_of_a_file_of_several_units_the_times_are_read_and_the_rest_is_counted(tmp_path):
    (trace,) = load(speedscope(tmp_path, sampled("bytes"), sampled("milliseconds"))).traces
    assert (trace.timed, trace.unit, len(trace.events)) == (True, "", 3)
    assert trace.dropped == {"profiles in another unit, beside others that count time": 1}
    (trace,) = load(speedscope(tmp_path, sampled("none"), sampled("bytes"))).traces
    assert (trace.timed, trace.unit, len(trace.events)) == (False, "none", 3)


def altered_nsys(folder, *statements):
    """The sample with these statements carried out on it."""
    path = samples.write(folder, "nsys")
    base = sqlite3.connect(path)
    for statement in statements:
        base.execute(statement)
    base.commit()
    base.close()
    (trace,) = load(path).traces
    return trace


def test_a_kernels_version_is_its_name_and_a_calls_is_not(tmp_path):
    trace = altered_nsys(tmp_path, "UPDATE StringIds SET value = 'paged_attention_v2' WHERE id = 1")
    assert rows(trace, Kind.KERNEL) == [("paged_attention_v2", 19, 40)]
    assert rows(trace, Kind.RUNTIME) == [("cudaLaunchKernel", 9, 5)]


OTHER = (1 << 48) | (99 << 24)
SECOND_PROCESS = (  # its device 0 is another one, by CUDA_VISIBLE_DEVICES
    "INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL "
    f"SELECT start, end, 0, 1, NULL, 7, 5, {OTHER}, 1, 2, NULL, 8, NULL FROM CUPTI_ACTIVITY_KIND_KERNEL"
)
DEVICES = "CREATE TABLE TARGET_INFO_CUDA_DEVICE (gpuId INTEGER, cudaId INTEGER, pid INTEGER, uuid TEXT)"


@pytest.mark.parametrize(
    ("gpus", "units"),
    [
        ([], ["device 0 (GPU 0, process 77)", "device 0 (GPU 0, process 99)"]),
        (["(2, 0, 77, '')", "(3, 0, 99, '')"], ["device 2", "device 3"]),
        (["(2, 0, 77, '')", "(2, 0, 99, '')"], ["device 2"]),
    ],
)
def test_a_device_of_nsys_is_the_machines_whatever_each_process_calls_it(tmp_path, gpus, units):
    inserts = [f"INSERT INTO TARGET_INFO_CUDA_DEVICE VALUES {gpu}" for gpu in gpus]
    trace = altered_nsys(tmp_path, SECOND_PROCESS, DEVICES, *inserts)
    assert [unit.name for unit in activities(trace)] == units
    assert len({(lane.process, lane.thread) for lane in trace.lanes}) == len(trace.lanes)
    assert set(trace.memory.device.tolist()) == {2 if gpus else 0}


def test_py_spy_pairs_beginnings_and_ends(tmp_path):
    assert rows(read(tmp_path, "py-spy"), Kind.FUNCTION) == [("main", 0, 50), ("work", 10, 30)]


def test_viztracer(tmp_path):
    trace = read(tmp_path, "viztracer")
    assert trace.format == "viztracer"
    assert rows(trace, Kind.FUNCTION) == [("main (/a/b.py:9)", 0, 20.07)]
    assert rows(trace, Kind.WAIT) == [("time.sleep", 5.09, 10)]


@pytest.mark.parametrize(
    "kernel",
    [
        "void deep_ep::intranode::dispatch<8>(int4*)",
        "void deep_ep::internode_ll::combine<true>(void*)",
        "void vllm::cross_device_reduce_1stage<__nv_bfloat16, 8>(RankData*)",
        "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)",
        "nvshmemi_transfer_kernel",
        "two_shot_all_reduce_kernel",
        "void mscclpp::allgather<2>()",
    ],
)
def test_communication_is_more_than_nccl(tmp_path, kernel):
    event = samples.slice_(kernel, "kernel", 0, 7, 5, 3, device=0)
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"traceEvents": [event]}))
    assert load(path).traces[0].events.kind.tolist() == [Kind.COMMUNICATION]


def test_an_unknown_category_is_in_no_sum_but_counted(tmp_path):
    event = samples.slice_("what is it", "new_category", 1, 1, 5, 3)
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"schemaVersion": 1, "traceEvents": [event, event]}))
    trace = load(path).traces[0]
    assert trace.events.kind.tolist() == [Kind.UNCLASSIFIED] * 2
    assert trace.unclassified == {"new_category": 2}


def test_reading_a_trace_of_pytorch_imports_neither_torch_nor_jax(tmp_path):
    import subprocess

    path = samples.write(tmp_path, "kineto zipped")
    code = f"import sys; from bench.traces.load import load; load({str(path)!r}); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert not {"torch", "jax", "numba", "ray", "pandas", "sqlite3"} & set(done.stdout.split())
