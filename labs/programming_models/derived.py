"""Quantities of several ways: where an eager chain leaves its overhead behind, when compiling has paid."""

from __future__ import annotations

import math
from collections.abc import Sequence

from labs.lab import Interval, Measurement, Results
from labs.programming_models.model import COMPILED, EAGER

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
    """Length at which overhead is half of an eager chain's time: overhead / time of one more number, from the
    chains of 2^8 and 2^16 numbers. None where the longer one is not slower."""
    few, many = 2**8, 2**16
    addresses = [f"chain_{size}/{name}" for size in (few, many)]
    if not results.has(*addresses):
        return None
    short, long = (results.seconds(address) for address in addresses)

    def crossing(short: float, long: float) -> float:
        slope = (long - short) / (many - few)
        return short / slope - few if slope > 0 else math.inf

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
