"""Small traces made by hand: a loop of equal steps, with times that a test can add up."""

from collections.abc import Mapping

import numpy as np

from bench.traces.events import Events, Job, Kind, Lane, Trace

MS = 1_000_000


def loop(
    operations: Mapping[str, float],
    steps: int = 12,
    *,
    shape: str = "[[64, 32], [32, 16]]",
    kernels: Mapping[str, str] | None = None,
    gap: float = 0.5,
    around: str = "",
    noise: float = 0.0,
    start_ms: float = 0.0,
    rank: int = -1,
    device: str = "",
) -> Trace:
    """Steps that do ``operations`` ({name: milliseconds}) one after another, after a gap of ``gap`` ms.

    kernels: {operation: kernel}: on a device, where each takes the milliseconds of its operation and the host
    launches them all at once at the beginning of the step. around: an operator that encloses all operations.
    Names that start with "gloo:" are collectives on a thread of their own.
    """
    rng = np.random.default_rng(steps)
    names: list[str] = ["ProfilerStep#", *operations, "launch", around, *(kernels or {}).values()]
    lanes = [Lane("python 1", "thread 1"), Lane("python 1", "thread 2"), Lane("GPU 0", "stream 7", 0)]
    rows: list[tuple[int, int, int, Kind, int, int]] = []  # start, duration, name, kind, lane, correlation
    time = round(start_ms * MS)
    for step in range(steps):
        begun, enclosing = time, len(rows)
        time += round(gap * MS)
        first = time
        for place, (name, milliseconds) in enumerate(operations.items()):
            length = round(milliseconds * MS * (1 + noise * rng.standard_normal()))
            code, correlation = names.index(name), step * len(operations) + place
            if kernels:
                launched = begun + 1000 * (place + 1)
                rows.append((launched, 500, code, Kind.OPERATOR, 0, -1))
                rows.append((launched + 100, 300, names.index("launch"), Kind.RUNTIME, 0, correlation))
                rows.append((time, length, names.index(kernels[name]), Kind.KERNEL, 2, correlation))
            elif name.startswith("gloo:"):
                rows.append((time, length, code, Kind.COMMUNICATION, 1, -1))
            else:
                rows.append((time, length, code, Kind.OPERATOR, 0, -1))
            time += length
        if around:
            rows.insert(enclosing, (first, time - first, names.index(around), Kind.OPERATOR, 0, -1))
        rows.append((begun, time - begun, 0, Kind.STEP, 0, -1))
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    named = dict(zip(("start", "duration", "name", "kind", "lane", "correlation"), columns, strict=True))
    shapes = np.where(named["kind"] == Kind.OPERATOR, 0, -1)
    events = Events.of(**named, shape=shapes)
    facts = {"device": device} if device else {}
    return Trace("made", "kineto", events, names, lanes, [shape], rank=rank, facts=facts)


def job(*traces: Trace, source: str = "made") -> Job:
    return Job(source, list(traces))
