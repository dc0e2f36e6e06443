"""Any profiler report, or a folder of them, as a ``Job``."""

from __future__ import annotations

import gc
from pathlib import Path

from bench.traces.events import Job, Trace
from bench.traces.folders import find_recordings, number_ranks, rank_in_name
from bench.traces.readers.source import DamagedArchive, Source
from bench.traces.recognise import recognise


def load(path: str | Path) -> Job:
    """The job in a file (one trace) or a folder (one trace a rank).

    ValueError, in one line: what is wrong with the file and where; of a folder, that it holds no report, or
    that none in it could be read. Files of a folder that cannot be read are in ``Job.failures``.
    """
    path = Path(path)
    if not path.is_dir():
        return Job(str(path), [read(path)])
    found = find_recordings(path)
    job = Job(str(path), [], list(found.failures), list(found.notes))
    for file in found.files:
        try:
            job.traces.append(read(file))
        except ValueError as error:
            job.failures.append((str(file), str(error)))
    if not job.traces:
        raise ValueError(f"no report in {path} can be read: {job.failures[0][1]}")
    number_ranks(job)
    return job


def read(path: str | Path) -> Trace:
    """One file. ValueError, in one line: what is wrong with it and where."""
    kind = recognise(path)
    collecting = gc.isenabled()
    gc.disable()  # a million events appear, none of which is garbage: worth a factor of two
    try:
        trace = _read(kind, path)
    except MemoryError:
        raise ValueError(f"{path} does not fit into the memory that is free") from None
    finally:
        if collecting:
            gc.enable()
    if trace.rank < 0:
        trace.rank = rank_in_name(path)
    if not len(trace.events):
        trace.notes.append("nothing was recorded: there is no slice of time in it")
    return trace


def _read(kind: str, path: str | Path) -> Trace:
    """Each reader, and what it needs, is imported where its kind of file is read."""
    if kind == "nsys":
        from bench.traces.readers import nsys

        return nsys.read(path)
    with Source(path) as source:
        if kind == "cprofile":
            from bench.traces.readers import cprofile

            return cprofile.read(source)
        if kind == "xplane":
            from bench.traces.readers import xplane

            return xplane.read(source)
        if kind == "speedscope":
            from bench.traces.readers import speedscope

            return speedscope.read(source)
        from bench.traces.readers import chrome_trace

        return chrome_trace.read(source)


def is_trace(path: str | Path) -> bool:
    """Whether there is a profiler report, or a folder with one, by content. Benchmark results are none."""
    path = Path(path)
    try:
        if path.is_dir():
            return bool(find_recordings(path).files)
        recognise(path)
    except DamagedArchive:
        return True  # nothing but a report is zipped, and load says what is wrong with it
    except ValueError:
        return False
    return True
