"""Every prediction of the lab, and the memory that a config needs."""

from __future__ import annotations

from collections.abc import Sequence

from labs.lab import Prediction
from labs.machine import Machine
from labs.programming_models import chain, expected, payback
from labs.programming_models.config import Config
from labs.programming_models.costs import FLOAT, Cost
from labs.programming_models.ways import NETWORKS, unavailable


def predict(config: Config, machine: Machine) -> Sequence[Prediction]:
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
    return [*found, *payback.predict(config, machine), *expected.predict(config)]


def memory_bytes(config: Config) -> float:
    """The longest chain's temporaries of some ways at once, and its float64 reference."""
    return 16.0 * FLOAT * config.elements + 100.0 * config.width**2 + 2**30
