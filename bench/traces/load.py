"""Any profiler report, or a folder of them, as a ``Job``."""

from __future__ import annotations

import gc
from pathlib import Path

from bench.traces.events import Job, Trace
from bench.traces.readers import chrome_trace
from bench.traces.readers.source import Source


def load(path: str | Path) -> Job:
    """The job in a file (one trace) or a folder (one trace a rank); ValueError says what is wrong."""
    path = Path(path)
    if path.is_dir():
        traces = [_read(p) for p in sorted(path.glob("*.json*"))]
        return Job(str(path), sorted(traces, key=lambda trace: trace.rank))
    return Job(str(path), [_read(path)])


def _read(path: Path) -> Trace:
    enabled = gc.isenabled()
    gc.disable()
    try:
        with Source(path) as source:
            return chrome_trace.read(source)
    finally:
        if enabled:
            gc.enable()


def is_trace(path: str | Path) -> bool:
    """Whether there is a profiler report (a file or a folder of them), by content."""
    path = Path(path)
    return path.is_dir() or b"traceEvents" in path.read_bytes()[:100000] or path.suffix == ".gz"
