"""cProfile's ``.prof``: how often each function was called, and for how long.

The file is a marshalled dictionary. marshal is made for Python's own files: a damaged or a hostile one may
crash the interpreter or eat its memory. It is therefore decoded by a child process that has limits and passes
on plain JSON; nothing in the file is ever executed.

There are only sums, no places in time: a row is a function, its duration the time spent in itself.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np

from bench.traces.classify import classify_python
from bench.traces.events import Lane, Trace
from bench.traces.readers.columns import LONGEST_NS, Columns
from bench.traces.readers.source import Source

LARGEST = 1 << 26  # bytes of the file; a thousand times what a large program's profile has
_Decoded = tuple[list[tuple[str, int, str, int, float]], int]
_SECONDS = 20
_MEMORY = 2 << 30

# Runs isolated (-I -S). Of a value only the calls and the seconds in the function itself are passed on.
_CHILD = f"""
import json, marshal, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({_SECONDS}, {_SECONDS}))
resource.setrlimit(resource.RLIMIT_AS, ({_MEMORY}, {_MEMORY}))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
rows, dropped = [], 0
profile = marshal.loads(sys.stdin.buffer.read())
if type(profile) is not dict:
    raise SystemExit(f"it holds a {{type(profile).__name__}}")
for key, value in profile.items():
    try:
        (file, line, function), (_, calls, own) = key, value[:3]
        if not 0 <= own < 1e7:
            raise ValueError(own)
        words = [str(word).encode("utf-8", "replace").decode() for word in (file, function)]
        rows.append([words[0], int(line), words[1], int(calls), float(own)])
    except Exception:
        dropped += 1
if profile and not rows:
    raise SystemExit("none of its entries is a function's")
print(json.dumps([rows, dropped]))
"""


def read(source: Source) -> Trace:
    """ValueError: damaged, another kind of file, or too large."""
    done = _decoded(source)
    rows, broken = msgspec.json.decode(done, type=_Decoded)
    columns = Columns(source.path)
    good = [row for row in rows if row[4] * 1e9 < LONGEST_NS and 0 < row[3] < 1 << 62]
    if broken + len(rows) > len(good):
        columns.dropped["entries that are no function's, or of no possible time"] += (
            broken + len(rows) - len(good)
        )
    if good:
        columns.add(
            start=np.zeros(len(good), np.int64),
            duration=np.rint(np.array([row[4] for row in good]) * 1e9).astype(np.int64),
            name=np.array([columns.names[_label(*row[:3])] for row in good], np.int32),
            lane=np.zeros(len(good), np.int32),
            calls=np.array([row[3] for row in good], np.int64),
        )
    events, _ = columns.finish(classify_python)
    return Trace(
        source=source.path,
        format="cprofile",
        events=events,
        names=columns.used_names,
        lanes=[Lane("process", "all profiled threads")] if good else [],
        timed=False,
        nested=False,
        dropped=columns.dropped,
        notes=["cProfile keeps sums: times are those spent in each function itself, in no order"],
    )


def _decoded(source: Source) -> bytes:
    data = source.rest(LARGEST)
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD], input=data, capture_output=True, timeout=2 * _SECONDS
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"{source.path}: decoding took more than {2 * _SECONDS} s and was stopped") from None
    if done.returncode == 0:
        return done.stdout
    if done.returncode < 0:
        why = f"decoding it crashed (signal {-done.returncode})"
    else:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        why = lines[-1] if lines else "no reason was given"
    raise ValueError(f"{source.path} is not a profile of cProfile: {why}")


def _label(file: str, line: int, function: str) -> str:
    if file == "~":  # built in
        return function
    return f"{function} ({'/'.join(Path(file).parts[-2:])}:{line})"
