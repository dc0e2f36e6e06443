"""Profiles of a group's steps after its timed rounds, and what is said of them: diagnosis and difference."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.rounds import Timed
from bench.world import WorldStep


def record(
    step: Callable[[], object],
    steps: int,
    path: Path,
    together: Callable[[], object] = lambda: None,
    wait: Callable[[Any], object] = lambda output: None,
) -> None:
    """``steps`` calls into a report of torch.profiler at ``path``. together: called before recording begins
    and before its first step, where several ranks record. wait: for what a call returned. What is counted of
    the process is of as many calls before, without a profiler."""
    from bench.profile.process import ProcessRecord
    from bench.profile.recorders import TorchRecorder

    together()
    process = ProcessRecord()
    process.start()
    for _ in range(steps):
        wait(step())
    recorder = TorchRecorder(steps, counted=process.stop())
    together()
    recorder.start()
    together()  # starting takes a while, on each rank another
    for _ in range(steps + 1):  # torch's schedule drops the first
        wait(step())
        recorder.step()
    if not recorder.stop(path):
        raise RuntimeError("the profiler recorded nothing")


def profiles(steps: Mapping[str, Timed], wanted: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """By variant ``{"diagnosis": ..., "difference": ...}``: what the program says of each one's report, and
    how that differs from the first one's. wanted: how many steps of a variant."""
    from bench.diagnose import diagnose
    from bench.traces.diff import difference
    from bench.traces.load import load

    found: dict[str, dict[str, Any]] = {}
    first = None
    with tempfile.TemporaryDirectory() as folder:
        for number, (address, count) in enumerate(wanted.items()):
            place = Path(folder) / str(number)
            place.mkdir()
            timed = steps[address]
            if isinstance(timed.step, WorldStep):
                timed.step.profile(count, str(place))
            else:
                record(timed.step, count, place / "profile.json.gz", wait=timed.clock.wait)
            job = load(place)
            found[address] = {"diagnosis": diagnose(job).to_json(), "difference": ""}
            if first is None:
                first = job
            else:
                with contextlib.suppress(ValueError):  # nothing in common
                    found[address]["difference"] = difference(first, job).sentence
    return found
