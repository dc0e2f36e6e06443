"""Some calls of a step under a profiler, into a report; for every rank of a variant, wherever it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.profile.process import ProcessRecord
from bench.profile.recorders import RECORDERS, Recorder, TorchRecorder


def record(
    step: Callable[[], object],
    steps: int,
    path: Path,
    together: Callable[[], object] = lambda: None,
    wait: Callable[[Any], object] = lambda output: None,
    kind: str = "torch",
) -> None:
    """``steps`` calls into a report of this kind of profiler at ``path``, marked where it can mark them.

    together: called before anything is counted, before recording begins and before its first step, where
    several ranks record. wait: for what a call returned. torch's profiler changes what is counted of the
    process, which therefore is of as many calls before it starts. RuntimeError: nothing was recorded.
    """
    together()
    recorder = _recorder(step, steps, wait, kind)
    together()
    recorder.start()
    try:
        together()  # starting takes a while, on each rank another; not a part of the first step
        for _ in range(steps + (kind == "torch")):  # torch's schedule drops the first
            wait(step())
            recorder.step()
    finally:
        written = recorder.stop(path)
    if not written:
        raise RuntimeError("the profiler recorded nothing")


def _recorder(step: Callable[[], object], steps: int, wait: Callable[[Any], object], kind: str) -> Recorder:
    if kind != "torch":
        return RECORDERS[kind](steps)
    process = ProcessRecord()
    process.start()
    try:
        for _ in range(steps):
            wait(step())
    finally:
        counted = process.stop() | {"steps": steps}
    return TorchRecorder(steps, counted=counted)
