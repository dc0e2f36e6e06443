"""Quantities of several ways: where an eager chain leaves its overhead behind, when compiling has paid."""

from __future__ import annotations

import math
from collections.abc import Sequence

from labs.lab import Interval, Measurement, Results
from labs.programming_models.model import COMPILED, EAGER, FEW, MANY, crossing

BASE = {"torch_compile": "torch", "jax_jit": "jax", "numba": "numpy"}


def derive(results: Results) -> Sequence[Measurement]:
    found = []
    for name in EAGER:
        if (crossing := crossover(results, name)) is not None:
            found.append(Measurement(f"crossover_{name}_elements", crossing))
    largest = results.config.elements
    for name in COMPILED:
        if (calls := breakeven(results, largest, name)) is not None:
            found.append(Measurement(f"breakeven_{name}_{largest}", calls))
    return found


def crossover(results: Results, name: str) -> Interval | None:
    """``crossing`` of measured times; None where the longer chain is not slower for certain."""
    addresses = [f"chain_{size}/{name}" for size in (FEW, MANY)]
    if not results.has(*addresses):
        return None
    short, long = (results.seconds(address) for address in addresses)
    ends = (crossing(short.low, long.high), crossing(short.high, long.low))
    value = crossing(short.value, long.value)
    return Interval(value, *ends) if math.isfinite(value) and math.isfinite(ends[1]) else None


def breakeven(results: Results, size: int, name: str) -> Interval | None:
    """Calls of a chain after which its first, compiling one has paid; infinite where a call saves nothing."""
    eager, compiled = f"chain_{size}/{BASE[name]}", f"chain_{size}/{name}"
    if not results.has(eager, compiled):
        return None
    slow, fast = results.seconds(eager), results.seconds(compiled)
    first = results.cold_seconds(compiled)

    def calls(saving: float) -> float:
        return first / saving if saving > 0 else math.inf

    return Interval(calls(slow.value - fast.value), calls(slow.high - fast.low), calls(slow.low - fast.high))
