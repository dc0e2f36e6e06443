"""Small reports of every format, as their profilers write them, for all tests of traces.

``SAMPLES`` has a file name and the bytes for each; ``write(folder, name)`` makes the file. What stands in
them is worked out by hand in the docstrings, so that tests can say what must come out.
"""

import cProfile
import gzip
import io
import json
import sqlite3
import tempfile
from pathlib import Path

EPOCH_US = 1_700_000_000_000_000


def slice_(name, category, process, thread, start, duration, **arguments):
    """One complete event of a Chrome trace; times in microseconds."""
    event = {"ph": "X", "name": name, "pid": process, "tid": thread, "ts": start, "dur": duration}
    if category:
        event["cat"] = category
    return event | ({"args": arguments} if arguments else {})


def label(what, process, thread, text):
    key = "labels" if what == "process_labels" else "name"
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "ts": 0, "args": {key: text}}


def gpu_step(start, number):
    """100 us: two kernels of 30 and 20 us on stream 7, an all-reduce of 40 us on stream 9, of which 10 us lie
    beside the second kernel, a copy of 5 us."""
    launch = {"cbid": 211, "External id": number}
    device = {"device": 0, "context": 1}
    first = 10 * number
    collective = {
        "Collective name": "allreduce",
        "In msg nelems": 1000,
        "Out msg nelems": 1000,
        "Group size": 2,
        "dtype": "Float",
        "Process Group Name": "0",
        "Process Group Description": "default_pg",
        "Process Group Ranks": "[0, 1]",
    }
    shape = {"Input Dims": [[64, 32], [32, 16]], "Input type": ["float", "float"]}
    runtime = [
        slice_("cudaLaunchKernel", "cuda_runtime", 100, 100, start + 2, 3, correlation=first, **launch),
        slice_("cudaLaunchKernel", "cuda_runtime", 100, 100, start + 12, 3, correlation=first + 1, **launch),
        slice_(
            "cudaLaunchKernelExC", "cuda_runtime", 100, 100, start + 22, 3, correlation=first + 2, **launch
        ),
        slice_("cudaMemcpyAsync", "cuda_runtime", 100, 100, start + 32, 3, correlation=first + 3, **launch),
        slice_("cudaDeviceSynchronize", "cuda_runtime", 100, 100, start + 40, 55, correlation=first + 4),
    ]
    arrows = [
        {"ph": "s", "id": first, "pid": 100, "tid": 100, "ts": start + 2, "cat": "ac2g", "name": "ac2g"},
        {
            "ph": "f",
            "id": first,
            "pid": 0,
            "tid": 7,
            "ts": start + 10,
            "cat": "ac2g",
            "name": "ac2g",
            "bp": "e",
        },
    ]
    return [
        slice_(f"ProfilerStep#{number}", "user_annotation", 100, 100, start, 100),
        slice_("aten::mm", "cpu_op", 100, 100, start + 1, 6, **shape, **{"External id": number}),
        slice_("aten::relu_", "cpu_op", 100, 100, start + 11, 6),
        slice_("nccl:all_reduce", "user_annotation", 100, 100, start + 21, 6),
        *runtime,
        *arrows,
        slice_("ampere_sgemm_32x32", "kernel", 0, 7, start + 10, 30, stream=7, correlation=first, **device),
        slice_("relu_kernel", "kernel", 0, 7, start + 40, 20, stream=7, correlation=first + 1, **device),
        slice_(
            *("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevComm*)", "kernel", 0, 9, start + 50, 40),
            **(device | {"stream": 9, "correlation": first + 2} | collective),
        ),
        slice_(
            *("Memcpy DtoH (Device -> Pinned)", "gpu_memcpy", 0, 7, start + 90, 5),
            **(device | {"stream": 7, "correlation": first + 3, "bytes": 4096}),
        ),
    ]


def memory(start, total, device=0, kind=1):
    arguments = {"Total Allocated": total, "Bytes": 512, "Device Type": kind, "Device Id": device}
    event = {"ph": "i", "cat": "cpu_instant_event", "s": "t", "name": "[memory]", "pid": 100, "tid": 100}
    return event | {"ts": start, "args": arguments}


def kineto_gpu(rank=0, steps=2, start=EPOCH_US):
    """A rank of two on a GPU, two steps of 100 us (see ``gpu_step``), one sample of memory in each."""
    events = [
        label("process_name", 100, 0, "python3"),
        label("process_labels", 100, 0, "CPU"),
        label("process_name", 0, 0, "python3"),
        label("process_labels", 0, 0, "GPU 0"),
        label("thread_name", 0, 7, "stream 7 "),
        label("thread_name", 100, 100, "thread 100 (python3)"),
    ]
    for number in range(steps):
        events += gpu_step(start + 100 * number, number)
        events.append(memory(start + 100 * number + 5, 1000 * (number + 1)))
    events.append(slice_("PyTorch Profiler (0)", "Trace", "Spans", "PyTorch Profiler", start - 50, 400))
    document = {
        "schemaVersion": 1,
        "deviceProperties": [{"id": 0, "name": "NVIDIA H100 80GB HBM3", "numSms": 132}],
        "distributedInfo": {"backend": "nccl", "rank": rank, "world_size": 2},
        "traceEvents": events,
        "traceName": "trace.json",
    }
    return json.dumps(document, indent=2).encode()


def kineto_old():
    """Categories and threads as before torch 1.13, whole microseconds, a sample of memory without a total."""
    stream = {"stream": 7, "correlation": 5, "device": 0}
    arguments = {"Device Type": 0, "Device Id": -1, "Bytes": 64}
    events = [
        slice_("aten::mm", "Operator", 55, "55", EPOCH_US, 10, **{"Input Dims": [[2, 2], [2, 2]]}),
        slice_("cudaLaunchKernel", "Runtime", 55, "55", EPOCH_US + 2, 4, correlation=5),
        slice_("sgemm", "Kernel", 0, "stream 7", EPOCH_US + 8, 20, **stream),
        {"ph": "i", "s": "t", "name": "[memory]", "pid": 55, "tid": 55, "ts": EPOCH_US, "args": arguments},
        {
            "ph": "i",
            "s": "t",
            "name": "[memory]",
            "pid": 55,
            "tid": 55,
            "ts": EPOCH_US + 1,
            "args": arguments,
        },
    ]
    return json.dumps({"schemaVersion": 1, "traceEvents": events}).encode()


def kineto_gloo(rank=0):
    """Two ranks on CPUs: an all-reduce of 250 floats, 30 us long, on a thread of its own."""
    dims = {"Input Dims": [[250]], "Input type": ["float"]}
    events = [
        slice_("ProfilerStep#3", "user_annotation", 9, 9, 1000.25, 100.5),
        slice_("aten::addmm", "cpu_op", 9, 9, 1001.0, 60.125, **{"Input Dims": [[4, 8], [8, 8]]}),
        slice_("gloo:all_reduce", "user_annotation", 9, 12, 1040.0, 30.0, **dims),
    ]
    info = {"backend": "gloo", "rank": rank, "world_size": 2}
    document = {"schemaVersion": 1, "distributedInfo": info, "baseTimeNanoseconds": 1_790_857_026_000_000_000}
    return json.dumps(document | {"traceEvents": events}).encode()


def jax_json():
    """JAX's trace.json: no categories, labels first, an empty object last."""
    operation = {"hlo_module": "jit_f", "hlo_op": "dot.1"}
    events = [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "/host:CPU"}},
        {"ph": "M", "pid": 2, "name": "process_name", "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "pid": 1, "tid": 10, "name": "thread_name", "args": {"name": "python"}},
        {"ph": "M", "pid": 2, "tid": 14, "name": "thread_name", "args": {"name": "Stream #14(Compute)"}},
        {"ph": "M", "pid": 2, "tid": 15, "name": "thread_name", "args": {"name": "XLA Modules"}},
        slice_("train", "", 1, 10, 1.5, 90.0, step_num="3"),
        slice_("$profiler.py:307 trace", "", 1, 10, 2.0, 80.0),
        slice_("dot.1", "", 1, 11, 10.0, 20.0, **operation),
        slice_("ThunkExecutor::Execute (wait for completion)", "", 1, 10, 12.0, 20.0),
        slice_("ncclDevKernel_AllReduce", "", 2, 14, 30.0, 20.0, **operation),
        slice_("MemcpyD2H", "", 2, 14, 52.0, 2.0),
        slice_("jit_f(1)", "", 2, 15, 30.0, 24.0),
        {},
    ]
    document = {"displayTimeUnit": "ns", "metadata": {"highres-ticks": True}, "traceEvents": events}
    return gzip.compress(json.dumps(document, separators=(",", ":")).encode(), mtime=0)


def _field(number, value):
    """One field of a protocol buffer: an integer or something with a length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value):
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def xplane():
    """One host plane: "dot.1" (an HLO op) of 20 us inside "PjitFunction(f)" of 50 us, a step around them.

    Fields as in tsl/profiler/protobuf/xplane.proto.
    """

    def metadata(number, key, name):
        return _field(number, _field(1, key) + _field(2, _field(1, key) + _field(2, name.encode())))

    def event(key, offset_us, duration_us, *stats):
        times = _field(2, offset_us * 1_000_000) + _field(3, duration_us * 1_000_000)
        return _field(4, _field(1, key) + times + b"".join(_field(4, stat) for stat in stats))

    step = _field(1, 2) + _field(4, 7)
    operation = _field(1, 1) + _field(5, b"dot.1")
    events = event(3, 0, 80, step) + event(1, 10, 50) + event(2, 20, 20, operation)
    line = _field(3, _field(1, 7) + _field(2, b"python") + _field(3, 5000) + events)
    names = metadata(4, 1, "PjitFunction(f)") + metadata(4, 2, "dot.1") + metadata(4, 3, "train")
    stats = metadata(5, 1, "hlo_op") + metadata(5, 2, "step_num")
    return _field(1, _field(1, 1) + _field(2, b"/host:CPU") + line + names + stats)


def nsys():
    """nsys's SQLite export: an NVTX range of 100 us, one launch, its kernel, a copy, a synchronise."""
    tables = """
    CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE ThreadNames (nameId INTEGER NOT NULL, priority INTEGER, globalTid INTEGER);
    CREATE TABLE TARGET_INFO_SESSION_START_TIME (utcEpochNs INTEGER, utcTime TEXT, localTime TEXT);
    CREATE TABLE TARGET_INFO_GPU (id INTEGER NOT NULL, name TEXT);
    CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER NOT NULL, end INTEGER NOT NULL,
      deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL, greenContextId INTEGER,
      streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER, demangledName INTEGER NOT NULL,
      shortName INTEGER NOT NULL, mangledName INTEGER, gridX INTEGER NOT NULL, graphNodeId INTEGER);
    CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (start INTEGER NOT NULL, end INTEGER NOT NULL,
      deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL, streamId INTEGER NOT NULL, correlationId INTEGER,
      globalPid INTEGER, bytes INTEGER NOT NULL, copyKind INTEGER NOT NULL);
    CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER NOT NULL, end INTEGER NOT NULL,
      eventClass INTEGER NOT NULL, globalTid INTEGER, correlationId INTEGER, nameId INTEGER NOT NULL,
      returnValue INTEGER NOT NULL, callchainId INTEGER);
    CREATE TABLE NVTX_EVENTS (start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL,
      rangeId INTEGER, category INTEGER, color INTEGER, text TEXT, globalTid INTEGER, endGlobalTid INTEGER,
      textId INTEGER, domainId INTEGER);
    CREATE TABLE OSRT_API (start INTEGER NOT NULL, end INTEGER NOT NULL, eventClass INTEGER NOT NULL,
      globalTid INTEGER, correlationId INTEGER, nameId INTEGER NOT NULL, returnValue INTEGER NOT NULL,
      nestingLevel INTEGER, callchainId INTEGER NOT NULL);
    CREATE TABLE CUDA_GPU_MEMORY_USAGE_EVENTS (start INTEGER NOT NULL, globalPid INTEGER NOT NULL,
      deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL, address INTEGER NOT NULL, bytes INTEGER NOT NULL,
      memKind INTEGER NOT NULL, memoryOperationType INTEGER NOT NULL);
    CREATE TABLE SCHED_EVENTS (start INTEGER NOT NULL, cpu INTEGER NOT NULL, isSchedIn INTEGER NOT NULL,
      globalTid INTEGER);
    """
    process = (1 << 48) | (77 << 24)
    thread = process | 78
    strings = (
        "void gemm<float>(int)",
        "gemm",
        "cudaLaunchKernel_v7000",
        "cudaStreamSynchronize_v3020",
        "python3",
    )
    strings += "pthread_cond_wait", "forward"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.sqlite"
        base = sqlite3.connect(path)
        base.executescript(tables)
        base.executemany("INSERT INTO StringIds VALUES (?, ?)", enumerate(strings, 1))
        base.execute("INSERT INTO ThreadNames VALUES (5, 0, ?)", (thread,))
        base.execute("INSERT INTO TARGET_INFO_SESSION_START_TIME VALUES (?, '', '')", (EPOCH_US * 1000,))
        base.execute("INSERT INTO TARGET_INFO_GPU VALUES (0, 'NVIDIA L4')")
        kernel = (20_000, 60_000, 0, 1, None, 7, 5, process, 1, 2, None, 8, None)
        base.execute(f"INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES ({', '.join('?' * 13)})", kernel)
        copy = (60_000, 65_000, 0, 1, 7, 6, process, 4096, 2)
        base.execute(f"INSERT INTO CUPTI_ACTIVITY_KIND_MEMCPY VALUES ({', '.join('?' * 9)})", copy)
        calls = [(10_000, 15_000, 0, thread, 5, 3, 0, None), (70_000, 90_000, 0, thread, 7, 4, 0, None)]
        base.executemany(f"INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES ({', '.join('?' * 8)})", calls)
        ranges = [
            (1_000, 101_000, 59, None, None, None, "step 4", thread, None, None, 0),
            (5_000, 50_000, 60, None, None, None, None, thread, None, 7, 0),
            (6_000, None, 34, None, None, None, "a mark", thread, None, None, 0),
        ]
        base.executemany(f"INSERT INTO NVTX_EVENTS VALUES ({', '.join('?' * 11)})", ranges)
        base.execute("INSERT INTO OSRT_API VALUES (2000, 4000, 0, ?, 1, 6, 0, 0, 0)", (thread + 1,))
        usage = [(3_000, process, 0, 1, 0, 1000, 2, 0), (4_000, process, 0, 1, 0, 400, 2, 1)]
        usage.append((5_000, process, 0, 1, 0, 9, 1, 0))  # pinned memory of the host
        base.executemany(f"INSERT INTO CUDA_GPU_MEMORY_USAGE_EVENTS VALUES ({', '.join('?' * 8)})", usage)
        base.executemany("INSERT INTO SCHED_EVENTS VALUES (?, 0, 1, ?)", [(1, thread), (2, thread)])
        base.commit()
        base.close()
        return path.read_bytes()


def _slow(count):
    return sum(number * number for number in range(count))


def cprofile():
    """A real profile of ``_slow``, called three times."""
    profile = cProfile.Profile()
    for _ in range(3):
        profile.runcall(_slow, 1000)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.prof"
        profile.dump_stats(path)
        return path.read_bytes()


def speedscope():
    """A sampled thread (main 30 ms, 20 of them in work), an evented one (main 0 to 9 us, wait 2 to 5)."""
    frames = [
        {"name": "main", "file": "a.py", "line": 3},
        {"name": "work"},
        {"name": "wait (threading.py:5)"},
    ]
    sampled = {"type": "sampled", "name": "sampled", "unit": "milliseconds", "startValue": 0, "endValue": 30}
    sampled |= {"samples": [[0, 1], [0, 1], [0]], "weights": [10, 10, 10]}
    marks = [("O", 0, 0), ("O", 2, 2), ("C", 2, 5), ("C", 0, 9)]
    evented = {"type": "evented", "name": "evented", "unit": "microseconds", "startValue": 0, "endValue": 9}
    evented["events"] = [{"type": kind, "frame": frame, "at": at} for kind, frame, at in marks]
    schema = "https://www.speedscope.app/file-format-schema.json"
    document = {"$schema": schema, "shared": {"frames": frames}, "profiles": [sampled, evented]}
    return json.dumps(document | {"exporter": "a test"}).encode()


def py_spy():
    """py-spy's Chrome trace: a bare list of beginnings and ends."""
    marks = [("B", "main", 0), ("B", "work", 10), ("E", "work", 40), ("E", "main", 50)]
    shared = {"cat": "py-spy", "pid": 5, "tid": 6, "args": {"filename": "a.py", "line": 1}}
    return json.dumps([{"ph": ph, "name": name, "ts": ts} | shared for ph, name, ts in marks]).encode()


def viztracer():
    """viztracer's: functions with file and line in their names; the sources stand behind the events."""
    events = [
        label("process_name", 3, 3, "MainProcess"),
        slice_("main (/a/b.py:9)", "fee", 3, 3, 100.41, 20.07),
        slice_("time.sleep", "fee", 3, 3, 105.5, 10.0),
    ]
    document = {"traceEvents": events, "viztracer_metadata": {"version": "1.1.1"}, "file_info": {"files": {}}}
    return json.dumps(document).encode()


def benchmarks():
    """Results of pytest-benchmark: no profiler report."""
    stats = {"data": [0.1, 0.2], "median": 0.15, "rounds": 2}
    entry = {"fullname": "test_a.py::test_a", "name": "test_a", "stats": stats}
    return json.dumps({"machine_info": {}, "benchmarks": [entry], "version": "5.2.3"}).encode()


def zipped(data):
    whole = io.BytesIO()
    with gzip.GzipFile(fileobj=whole, mode="wb", mtime=0) as file:
        file.write(data)
    return whole.getvalue()


SAMPLES = {
    "kineto": ("gpu.pt.trace.json", kineto_gpu),
    "kineto zipped": ("gpu.pt.trace.json.gz", lambda: zipped(kineto_gpu())),
    "kineto old": ("old.json", kineto_old),
    "kineto gloo": ("cpu.json", kineto_gloo),
    "jax json": ("vm.trace.json.gz", jax_json),
    "xplane": ("vm.xplane.pb", xplane),
    "nsys": ("report.sqlite", nsys),
    "cprofile": ("program.prof", cprofile),
    "speedscope": ("profile.speedscope.json", speedscope),
    "py-spy": ("spy.json", py_spy),
    "viztracer": ("result.json", viztracer),
}
"""Name of a format: (file name, function that makes its bytes)."""


def write(folder, name):
    """The sample as a file in the folder; its path."""
    file_name, make = SAMPLES[name]
    path = Path(folder) / file_name
    path.write_bytes(make())
    return path
