"""What the lab states before measuring: seconds of each operation, and where the GPU begins to win."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from labs.lab import Interval, Measurement, Prediction, Results
from labs.machine import Machine, load_sheet
from labs.roofline.config import Config
from labs.roofline.model import cpu_seconds, crossover, gpu_seconds
from labs.roofline.operations import Operation, elementwise, operations, product


def the_gpu(machine: Machine, config: Config) -> Machine:
    """The machine's own GPU, the sheet itself, or the sheet to compare with."""
    if machine.gpu is not None:
        return machine.gpu
    return machine if is_sheet(machine) else load_sheet(config.versus)


def is_sheet(machine: Machine) -> bool:
    return not machine.measured and "launch_s" in machine.constants


def predict(config: Config, machine: Machine) -> Sequence[Prediction]:
    """Seconds of each operation on each device the machine has; of a spec sheet, on that GPU."""
    found = []
    for operation in operations(config):
        if not is_sheet(machine):
            for device in operation.devices:
                if device != "cuda":
                    seconds, because = cpu_seconds(operation, machine, ours=device == "kernels")
                    address = operation.address(device)
                    found.append(Prediction(address, "time_s", seconds, because, operation.suspect))
        if machine.gpu is not None or is_sheet(machine):
            seconds, because = gpu_seconds(operation, the_gpu(machine, config))
            suspect = "the library's kernel for this size, clocks under load, or a shared device"
            found.append(Prediction(operation.address("cuda"), "time_s", seconds, because, suspect))
    if machine.gpu is not None and not is_sheet(machine):
        for family in FAMILIES:
            size = crossover(family.operation, machine, machine.gpu)
            if size is not None:
                because = (
                    f"where the CPU's predicted time meets that of {machine.gpu.name}, data already there"
                )
                suspect = "interpolated between few sizes; both curves are nearly parallel"
                found.append(Prediction("", family.key, size, because, suspect))
    return found


@dataclass(frozen=True)
class Family:
    """One operation at growing sizes.

    key: of the prediction of the size from which the GPU wins. unit: what the size counts.
    operation: the operation at a size. groups: ``(config) -> [(group, size)]`` of those that are measured.
    """

    key: str
    title: str
    unit: str
    operation: Callable[[int], Operation]
    groups: Callable[[Config], Sequence[tuple[str, int]]]


FAMILIES = (
    Family(
        "add_gpu_wins_from_elements",
        "Addition",
        "elements",
        lambda size: elementwise("add", "addition", lambda torch: torch.add, size, 2),
        lambda config: (
            ("add_one", 1),
            ("add_16k", 2**14),
            ("add_cache", config.cache_elements),
            ("add_memory", config.memory_elements),
        ),
    ),
    Family(
        "matmul_gpu_wins_from_rows",
        "Matrix product",
        "rows",
        lambda size: product("matmul", size),
        lambda config: (
            ("matmul_64", 64),
            ("matmul_128", 128),
            ("matmul_512", 512),
            ("matmul_large", config.matrix),
        ),
    ),
)


def derive(results: Results) -> Sequence[Measurement]:
    """The size from which the GPU wins, interpolated in the logarithms between the sizes measured."""
    found = []
    for family in FAMILIES:
        points = [
            (size, results.ratio(f"{group}/cuda", f"{group}/cpu"))
            for group, size in sorted(family.groups(results.config), key=lambda item: item[1])
            if results.has(f"{group}/cuda", f"{group}/cpu")
        ]
        crossings = [
            _crossing([(size, getattr(ratio, end)) for size, ratio in points])
            for end in ("value", "low", "high")
        ]
        value, early, late = crossings
        if value is not None:
            low, high = early if early is not None else value, late if late is not None else value
            found.append(Measurement(family.key, Interval(value, min(low, value), max(high, value))))
    return found


def _crossing(points: Sequence[tuple[int, float]]) -> float | None:
    """The size at which a falling ratio passes 1, or None when it never does."""
    for (left, above), (right, below) in pairwise(points):
        if above > 1 >= below:
            part = math.log(above) / math.log(above / below)
            return math.exp(math.log(left) * (1 - part) + math.log(right) * part)
    return None
