"""Mended or not, a job trains the same: its losses against those of a plain float64 job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from labs.bottlenecks import device, faults
from labs.bottlenecks.config import Config
from labs.bottlenecks.faults import Plant
from labs.bottlenecks.job import Job, best_precision, proof_of
from labs.lab import Check

PLAIN: dict[str, Plant] = {
    "dispatch": faults.short_sequences,
    "python": faults.tensor_entropy,
    "memory_capacity": faults.deeper,
}
"""Groups whose job is another one, and that without a fault."""
TOLERANCE = {"bfloat16": 2.0**-6, "float32": 2.0**-11}
"""Of losses, relative: a few roundings of the type (2^-8, 2^-24), grown by three steps of AdamW, whose first
steps move a parameter by the sign of its gradient alone."""


@cache
def reference(config: Config, plant: Plant) -> Any:
    """The losses, and the entropy of the predictions where the job watches it; float64."""
    import torch

    job = Job(config)
    try:
        plant(job)
        job.precision = "float64"
        job.model.double()
        job.optimizer = torch.optim.AdamW(job.model.parameters(), job.optimizer.defaults["lr"], foreach=False)
        return proof_of(job)
    finally:
        job.close()


def precision_of(address: str) -> str:
    """The type of a job's products: a device's is its own, whatever the CPU multiplies fast."""
    if address == "compute_precision/fault":
        return "float32"
    return device.PRECISION if address.partition("/")[0] == "transfer_synchronization" else best_precision()


def check(config: Config, outputs: Mapping[str, object]) -> Sequence[Check]:
    import torch

    found = []
    for address, output in outputs.items():
        plain = reference(config, PLAIN.get(address.partition("/")[0], faults.healthy))
        precision = precision_of(address)
        mine = torch.as_tensor(output, dtype=torch.float64)
        error = ((mine - plain).abs() / plain.abs().clamp(min=1.0)).max()
        found.append(Check(address, float(error), TOLERANCE[precision], "losses of a float64 job (relative)"))
    return found
