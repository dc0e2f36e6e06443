"""Traces written down as rows, for tests that say to the nanosecond what must come out."""

from bench.traces.events import Events, Kind, Lane, Trace

MAIN = Lane("python 1", "thread 1 (main)")
BACKWARD = Lane("python 1", "thread 2 (pt_autograd_0)")
COMPUTE_STREAM = Lane("GPU 0", "stream 7", device=0)
COMMUNICATION_STREAM = Lane("GPU 0", "stream 20", device=0)
LANES = (MAIN, BACKWARD, COMPUTE_STREAM, COMMUNICATION_STREAM)


def trace(rows, lanes=LANES, **fields):
    """Rows of (kind, name, lane, start, end) and, where wanted, a dictionary of further columns.

    Further columns: correlation, flops, bytes, calls, and shape as text.
    """
    rows = [(*row, {}) if len(row) == 5 else row for row in rows]
    names = list(dict.fromkeys(row[1] for row in rows))
    shapes = list(dict.fromkeys(row[5]["shape"] for row in rows if "shape" in row[5]))
    columns = {
        "kind": [row[0] for row in rows],
        "name": [names.index(row[1]) for row in rows],
        "lane": [lanes.index(row[2]) for row in rows],
        "start": [row[3] for row in rows],
        "duration": [row[4] - row[3] for row in rows],
        "shape": [shapes.index(row[5]["shape"]) if "shape" in row[5] else -1 for row in rows],
    }
    for column in ("correlation", "flops", "bytes", "calls"):
        columns[column] = [row[5].get(column, Events.MISSING[column]) for row in rows]
    fields = {"source": "made.json", "format": "kineto", **fields}
    return Trace(events=Events.of(**columns), names=names, lanes=list(lanes), shapes=shapes, **fields)


def launched(number, name, called, starts, ends, lane=COMPUTE_STREAM, kind=Kind.KERNEL, thread=MAIN, **more):
    """A slice of a device and the runtime call of 5 ns that launches it."""
    return [
        (Kind.RUNTIME, "cudaLaunchKernel", thread, called, called + 5, {"correlation": number}),
        (kind, name, lane, starts, ends, {"correlation": number, **more}),
    ]
