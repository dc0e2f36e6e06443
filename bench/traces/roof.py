"""What the machine can reach on which a trace was recorded, where that is known."""

from __future__ import annotations

import json
import os

from msgspec import Struct

from bench.traces.events import Trace


class Roof(Struct, frozen=True):
    """What the machine can reach, and what that figure is."""

    flops_per_second: float
    of: str


def roof_of(trace: Trace) -> Roof | None:
    """The peak of this machine, if it was calibrated and the trace was recorded on it; else None.

    A trace of the host is from here if it names this host, one of a GPU if the calibrated GPU has the name in
    the report. Reports do not tell types apart: float32 is assumed on the host, bfloat16 on a GPU.
    """
    device = trace.facts.get("device", "")
    if not device and trace.facts.get("host") != os.uname().nodename:
        return None
    if device and not _is_calibrated(device):  # quicker than to load what cannot be used
        return None
    from labs.machine import load_cached

    machine = load_cached()
    if machine is None:
        return None
    if not device:
        peak = machine.get("vector_float32_all_flops")
        return Roof(peak, "float32 peak") if peak else None
    gpu = machine.gpu
    peak = gpu.get("matrix_bfloat16_all_flops") if gpu is not None and gpu.name == device else None
    return Roof(peak, "bfloat16 peak") if peak else None


def _is_calibrated(gpu: str) -> bool:
    """Whether some machine that was calibrated has such a GPU."""
    from labs.home import calibrations

    name = json.dumps(gpu).encode()
    try:
        return any(name in path.read_bytes() for path in calibrations())
    except OSError:
        return False
