"""A product cut over devices: JAX's ``shard_map`` over host devices, torch's DTensor over two processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from labs.jax_transforms import sharded_program
from labs.jax_transforms.arrays import to_torch
from labs.jax_transforms.config import Config
from labs.jax_transforms.excerpts import WIDTH
from labs.jax_transforms.sharded_program import COLUMNS, LAYOUTS, ROWS
from labs.lab import Prediction, Recorder, Step, Variant
from labs.machine import Machine

HOST, TWO = "shard_map", "dtensor"  # the groups
SHARD_MAP, DTENSOR = f"{HOST}/host_devices", f"{TWO}/two_processes"
LIMIT_S = 120.0
RESULT_BYTES = 4.0 * ROWS * COLUMNS
EXPECTED = {"batch": (), "columns": ("all-gather",), "rows": ("all-reduce",)}
"""Collectives that each layout needs."""
ERROR = re.compile(r"(\w+\.)*\w+(Error|Exception|Exit|Interrupt)\b")


def reference(config: Config, name: str) -> Any:
    x, w = (array.astype("float64") for array in sharded_program.inputs())
    return (x @ w,) * (len(LAYOUTS) if name == "host_devices" else 1)


@cache
def over_devices(devices: int, limit_s: float = LIMIT_S) -> dict[str, Any]:
    """What ``sharded_program`` reports, from a process that has so many host devices; asked once.

    TimeoutError: it did not end in time, and was killed. RuntimeError: it failed; names its error.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "labs.jax_transforms.sharded_program", str(devices)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit_s, env={**os.environ, **environment}
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(
            f"the lab waited {limit_s:g} s for its child process with {devices} JAX host devices and ended it"
        ) from None
    if done.returncode:
        raise RuntimeError(f"the child process with {devices} JAX host devices failed: {error(done.stderr)}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def error(said: str) -> str:
    """The last line that names an exception; JAX puts remarks behind it. The last one where none does."""
    lines = said.strip().splitlines() or ["no message"]
    return next((line for line in reversed(lines) if ERROR.match(line)), lines[-1])


def _shard_map(config: Config, recorder: Recorder) -> Step:
    def step() -> Any:
        import numpy as np

        found = over_devices(config.devices)
        for layout, told in found.items():
            recorder.record(f"{layout}_collectives", len(told["kinds"]), "")
            recorder.record(f"{layout}_payload", told["bytes"], "B")
            lines = "\n".join(f"{line[:WIDTH]} ..." for line in told["lines"])
            recorder.text(
                f"A product over {config.devices} devices, cut by {layout} (HLO)",
                f"Needs {' and '.join(told['kinds']) or 'no collective'}: {told['bytes']} B of payload.\n\n"
                f"{lines or '(no collective)'}",
            )
        return tuple(np.array(told["result"]).reshape(ROWS, COLUMNS) for told in found.values())

    return step


def _dtensor(config: Config, recorder: Recorder) -> Step:
    """Columns of x and rows of w on each of two ranks: every rank has a part of each sum."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    x, w = to_torch(sharded_program.inputs())
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    x, w = distribute_tensor(x, mesh, [Shard(1)]), distribute_tensor(w, mesh, [Shard(0)])

    def step() -> Any:
        return (x @ w).redistribute(mesh, [Replicate()]).to_local()

    with CommDebugMode() as counted:
        step()
    recorder.record("rows_collectives", counted.get_total_counts(), "")
    return step


def variants(config: Config) -> Sequence[Variant]:
    """A group each: the first is a process from start to end, and what it counts is the point."""
    return [
        Variant(HOST, "host_devices", _shard_map, threads=0, max_rounds=1),
        Variant(TWO, "two_processes", _dtensor, processes=2),
    ]


def predict(config: Config, machine: Machine) -> Sequence[Prediction]:
    found = []
    for layout, kinds in EXPECTED.items():
        because = " and ".join(kinds) or "each device has whole sums of its own rows"
        counts = {"collectives": float(len(kinds)), "payload_B": RESULT_BYTES * len(kinds)}
        for key, value in counts.items():
            found.append(Prediction(SHARD_MAP, f"{layout}_{key}", value, because, exact=True))
    return [
        *found,
        Prediction(
            DTENSOR,
            "rows_collectives",
            1.0,
            "all-reduce: each rank has a part of each sum",
            exact=True,
        ),
    ]
