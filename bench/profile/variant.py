"""One rank of a lab's variant under a profiler: ``python -m bench.profile.variant SETTINGS``, or by torchrun.

Set up, called cold and warmed up outside the profile; then ``steps`` calls, each marked where the profiler
can mark steps.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from bench.clocks import clock
from bench.measure import RoundRecorder, explain
from bench.profile.child import report_name
from bench.profile.recorders import RECORDERS
from bench.profile.steps import record
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
        kind = kind or _kind_of(variant, set(sys.modules) - before)
        path = Path(output) / f"{report_name()}{RECORDERS[kind].suffix}"
        record(step, steps, path, _barrier if ranks > 1 else _nobody, waits.wait, kind)
    finally:
        close = getattr(step, "close", None)
        if close is not None:
            close()


def _barrier() -> None:
    import torch.distributed as dist

    dist.barrier()


def _nobody() -> None:
    """One rank waits for none."""


def _kind_of(variant: Variant, brought: set[str]) -> str:
    """By what the variant's setup and calls have imported; ranks of a world use torch.distributed."""
    if variant.clock == "jax":
        return "jax"
    if variant.processes > 1 or variant.clock == "cuda" or "torch" in brought:
        return "torch"
    return "jax" if "jax" in brought else "cprofile"


if __name__ == "__main__":
    sys.exit(main())
