"""Each reader against a small file of its format, of which samples.py says what stands in it."""

import cProfile
import json
import marshal
import sys

import numpy as np
import pytest
import samples

from bench.traces.events import Kind
from bench.traces.load import load


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
