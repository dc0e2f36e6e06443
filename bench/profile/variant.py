"""One rank of a lab's variant under a profiler: ``python -m bench.profile.variant SETTINGS``, or by torchrun.

Set up, called cold and warmed up outside the profile; then ``steps`` calls, each marked where the profiler
can mark steps.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from bench.clocks import Clock, clock
from bench.measure import RoundRecorder, explain
from bench.profile.child import report_name
from bench.profile.process import ProcessRecord
from bench.profile.recorders import RECORDERS, Recorder, TorchRecorder
from labs import load
from labs.lab import Variant, find

WARM_CALLS = 2
WAIT_SECONDS = 120.0


def main() -> int:
    settings = json.loads(sys.argv[1])
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    rank = f"rank {os.environ.get('RANK', '0')} of {ranks}: " if ranks > 1 else ""
    try:
        if ranks > 1:
            import torch.distributed as dist

            dist.init_process_group("gloo", timeout=timedelta(seconds=WAIT_SECONDS))
        _record(ranks, **settings)
        if ranks > 1:
            dist.barrier()  # nobody leaves while another still writes
            dist.destroy_process_group()
    except Exception as error:
        print(f"perflab: {rank}{explain(error)}", file=sys.stderr, flush=True)
        return 1
    return 0


def _record(
    ranks: int, lab: str, config: dict[str, Any], address: str, output: str, kind: str, steps: int
) -> None:
    declared = load(lab)
    settings = declared.config(**config)
    variant = find(declared, settings, address)
    before = set(sys.modules)
    step, waits = variant.setup(settings, RoundRecorder()), clock(variant.clock)
    try:
        for _ in range(1 + WARM_CALLS):
            waits.wait(step())
        recorder = _recorder(kind or _kind_of(variant, set(sys.modules) - before), steps, step, waits)
        _run(step, waits, recorder, steps, ranks)
        path = Path(output) / f"{report_name()}{recorder.suffix}"
        if not recorder.stop(path):
            raise RuntimeError("the profiler recorded nothing")
    finally:
        close = getattr(step, "close", None)
        if close is not None:
            close()


def _recorder(kind: str, steps: int, step: Callable[[], object], waits: Clock) -> Recorder:
    """torch's profiler changes what is counted of the process, which is of as many calls before it starts."""
    if kind != "torch":
        return RECORDERS[kind](steps)
    process = ProcessRecord()
    process.start()
    for _ in range(steps):
        waits.wait(step())
    return TorchRecorder(steps, counted=process.stop() | {"steps": steps})


def _run(step: Callable[[], object], waits: Clock, recorder: Recorder, steps: int, ranks: int) -> None:
    if ranks > 1:
        import torch.distributed as dist

        dist.barrier()
    recorder.start()
    if ranks > 1:
        dist.barrier()  # starting takes a while, on each rank another; not a part of the first step
    warms = isinstance(recorder, RECORDERS["torch"])  # torch's schedule begins with a step that it drops
    for _ in range(steps + warms):
        waits.wait(step())
        recorder.step()


def _kind_of(variant: Variant, brought: set[str]) -> str:
    """By what the variant's setup and calls have imported; ranks of a world use torch.distributed."""
    if variant.clock == "jax":
        return "jax"
    if variant.processes > 1 or variant.clock == "cuda" or "torch" in brought:
        return "torch"
    return "jax" if "jax" in brought else "cprofile"


if __name__ == "__main__":
    sys.exit(main())
