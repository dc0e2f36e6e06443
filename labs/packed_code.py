"""What compiled loops on full registers cost, from how many instructions they are."""

from __future__ import annotations

import math

from labs.machine import Machine

EXP_WORK = 22
"""Instructions of kernels/simd.py's exp on a register: an FMA is one; comparisons and integers count."""


def instruction_seconds(machine: Machine, per_element: float, elements: float) -> float:
    """``per_element`` SIMD instructions for each lane's element, at the rate at which an exp does its own.

    Not at that of FMAs: comparisons, selections and integers have fewer units, and loops load and store.
    """
    return per_element * elements * machine["packed_exp_s"] / EXP_WORK


def across_lanes_seconds(machine: Machine) -> float:
    """Reducing one register to a number: each halving is a shuffle and an operation that waits for it."""
    return 2 * math.log2(machine["vector_lanes_float32"]) * machine["fma_latency_s"]
