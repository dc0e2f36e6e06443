"""Every prediction of the lab, and the memory that a config needs."""

from __future__ import annotations

from collections.abc import Sequence

from labs.lab import Prediction
from labs.machine import Machine
from labs.programming_models import chain, expected, gpt_block, payback, training_step
from labs.programming_models.config import HEADS, Config
from labs.programming_models.costs import FLOAT, Cost
from labs.programming_models.ways import NETWORKS, unavailable


def predict(config: Config, machine: Machine) -> Sequence[Prediction]:
    """CUDA's ways are not predicted: no constant of a machine is about launching what they launch."""
    found: list[Prediction] = []

    def say(group: str, name: str, cost: Cost) -> None:
        found.append(Prediction(f"{group}/{name}", "time_s", cost.seconds, cost.because, cost.suspect))

    for size in config.sizes:
        for name in chain.NAMES:
            if name not in chain.CUDA and not unavailable(f"chain_{size}", name):
                say(f"chain_{size}", name, chain.cost(machine, size, name))
    for group, part in NETWORKS.items():
        for name in part.NAMES:
            if not unavailable(group, name):
                say(group, name, part.cost(config, machine, name))
    made = {f"chain_{config.elements}": chain.KERNELS, "training_step": training_step.KERNELS}
    for group, kernels in (made | {"gpt_block": gpt_block.KERNELS}).items():
        for name, count in kernels.items():
            if not unavailable(group, name):
                because = "loops that the compiler leaves beside the library's products"
                suspect = "another version of the compiler, which fuses by other rules"
                found.append(Prediction(f"{group}/{name}", "kernels", count, because, suspect))
    return [*found, *payback.predict(config, machine), *expected.predict(config)]


def memory_bytes(config: Config) -> float:
    """Of the largest group, beside the libraries: groups run one after the other, the ways of one together.

    A way holds its inputs (JAX's a second time) and its output; the float64 reference is twice as large, and
    holds what it went through.
    """
    width, rows = float(config.width), float(config.batch)
    parameters = training_step.LAYERS * width * (width + 1)
    groups = (
        28.0 * FLOAT * config.elements,
        30.0 * FLOAT * parameters + 55.0 * FLOAT * rows * width,
        # A block has 12 width^2 parameters and up to 4 width numbers a token at once; scores of each head.
        12.0 * FLOAT * 12 * width**2 + FLOAT * config.tokens * (80.0 * width + 12.0 * HEADS * config.tokens),
    )
    return max(groups) + 2.0**30
