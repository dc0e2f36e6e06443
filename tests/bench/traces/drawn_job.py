"""Jobs for the tests of pages, as columns: known slices on a host and a device, any names, any number."""

import base64

import numpy as np

from bench.traces.events import Events, Job, Kind, Lane, Memory, Trace

MS = 1_000_000
LANES = [Lane("python 7", "thread 7 (python)"), Lane("python 7", "stream 7", 0)]
STEPS = 4


def training(rank=-1, source="trace.json", slow=1.0, rename=str):
    """Four steps of 10 ms: forward (3 ms, in it aten::mm, which launches gemm of 2 ms), all_reduce (1 ms).

    slow: a factor on gemm. rename: what each name becomes.
    """
    rows = []
    for step in range(STEPS):
        at = 10 * step * MS
        rows += [
            (f"ProfilerStep#{step}", Kind.STEP, 0, at, 9 * MS, -1),
            ("forward", Kind.ANNOTATION, 0, at + MS // 10, 3 * MS, -1),
            ("aten::mm", Kind.OPERATOR, 0, at + MS, MS, -1),
            ("cudaLaunchKernel", Kind.RUNTIME, 0, at + MS + 100, MS // 2, step),
            ("gemm", Kind.KERNEL, 1, at + 2 * MS, int(2 * MS * slow), step),
            ("all_reduce", Kind.COMMUNICATION, 1, at + 7 * MS, MS, 100 + step),
        ]
    return trace_of(rows, rank=rank, source=source, rename=rename)


def trace_of(rows, lanes=LANES, rename=str, **options):
    """A trace of rows (name, kind, lane, start, duration, correlation), times in nanoseconds."""
    names = list(dict.fromkeys(row[0] for row in rows))
    columns = list(zip(*rows, strict=True)) if rows else [[]] * 6
    events = Events.of(
        name=[names.index(name) for name in columns[0]],
        kind=[int(kind) for kind in columns[1]],
        lane=columns[2],
        start=columns[3],
        duration=columns[4],
        correlation=columns[5],
        shape=[0 if name == "aten::mm" else -1 for name in columns[0]],
    )
    time = np.arange(4) * 10 * MS
    memory = Memory(time, np.array([1, 3, 2, 4]) << 20, np.zeros(4, np.int32))
    shapes = [rename("[[64, 32], [32, 16]]")]
    return Trace(
        options.pop("source", "trace.json"),
        "kineto",
        events,
        [rename(name) for name in names],
        [Lane(rename(lane.process), rename(lane.thread), lane.device) for lane in lanes],
        shapes,
        memory=memory,
        facts={rename("device"): rename("NVIDIA H100")},
        **options,
    )


def job(*traces, failures=()):
    return Job("folder/job", list(traces), list(failures))


def bottomless(depth):
    """Events of that many slices, each inside the one before."""
    rows, zeros = np.arange(depth), np.zeros(depth)
    return Events.of(start=rows, duration=2 * (depth - rows), lane=zeros, name=zeros, kind=zeros)


def many(count, seed=0, lanes=12):
    """About that many slices in nested stacks on some threads and kernels on streams: a busy 2 s."""
    random = np.random.default_rng(seed)
    each = count // lanes
    start, duration, lane, kind, name = [], [], [], [], []
    for number in range(lanes):
        on_device = number >= lanes - 2
        # Stacks of five: the parent and four within one another, each a little shorter.
        stacks = each if on_device else each // 5
        gaps = random.exponential(1.0, stacks)
        at = (np.cumsum(gaps) / gaps.sum() * 2e9).astype(np.int64)
        room = np.diff(at, append=at[-1] + 10_000)
        for depth in range(1 if on_device else 5):
            start.append(at + depth * (room // 40))
            duration.append(np.maximum(room * 7 // 10 - 2 * depth * (room // 40), 1))
            lane.append(np.full(stacks, number))
            kind.append(
                np.full(stacks, Kind.KERNEL if on_device else Kind.FUNCTION if depth < 2 else Kind.OPERATOR)
            )
            name.append(random.integers(0, 3000, stacks))
    columns = {"start": start, "duration": duration, "lane": lane, "kind": kind, "name": name}
    events = Events.of(**{key: np.concatenate(parts) for key, parts in columns.items()})
    names = [f"void module_{i % 70}::kernel_of_a_long_name_{i}<float, {i}>(Tensor, int)" for i in range(3000)]
    places = [Lane("python 1", f"thread {i}") for i in range(lanes - 2)]
    places += [Lane("python 1", f"stream {i}", 0) for i in range(2)]
    return Trace("many.json", "kineto", events, names, places)


def unpacked(text):
    """Plain LEB128, byte by byte."""
    found, value, shift = [], 0, 0
    for byte in base64.b64decode(text):
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            found.append(value)
            value = shift = 0
    return found
