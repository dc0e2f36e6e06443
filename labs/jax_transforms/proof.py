"""Proof: every way returns what plain NumPy code in float64 returns.

A step's output is a structure of leaves (``arrays.leaves``). Each leaf's largest difference is taken relative
to the leaf's largest number; sums of n rounded terms are off by some sqrt(n) roundings (Higham 2002, section
4.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from labs.jax_transforms import (
    batched,
    derivatives,
    dispatch,
    misuse,
    recurrent,
    retracing,
    sample_gradients,
    sharded_program,
    sharding,
    softmax,
    training,
)
from labs.jax_transforms.arrays import leaves
from labs.jax_transforms.config import Config
from labs.lab import Check

ROUNDING = 2.0**-24  # of one float32 operation, relative
Reference = Callable[[Config, str], Any]
REFERENCES: dict[str, tuple[Reference, Callable[[Config], float]]] = {
    dispatch.GROUP: (dispatch.reference, lambda config: 8),
    batched.GROUP: (batched.reference, lambda config: batched.DEPTH),
    sample_gradients.GROUP: (sample_gradients.reference, lambda config: 3 * config.features),
    training.GROUP: (training.reference, lambda config: 4 * config.width + config.batch),
    recurrent.GROUP: (recurrent.reference, lambda config: config.steps * config.hidden),
    recurrent.GRADIENT: (recurrent.gradient_reference, lambda config: config.steps * config.hidden),
    derivatives.JACOBIAN: (derivatives.jacobian_reference, lambda config: config.inputs + derivatives.HIDDEN),
    derivatives.HESSIAN: (derivatives.hessian_reference, lambda config: config.parameters + derivatives.ROWS),
    softmax.GROUP: (softmax.reference, lambda config: config.side),
    retracing.GROUP: (retracing.reference, lambda config: retracing.SHORTEST + config.lengths),
    sharding.HOST: (sharding.reference, lambda config: sharded_program.INNER),
    sharding.TWO: (sharding.reference, lambda config: sharded_program.INNER),
}
"""Group -> float64 results, and how many rounded terms a number of them is the sum of."""


def tolerance(depth: float) -> float:
    """16 sqrt(n) roundings: exp and tanh are off by a few each, and errors pass through layers."""
    return 16 * ROUNDING * math.sqrt(depth)


def check(config: Config, outputs: Mapping[str, object]) -> list[Check]:
    """TypeError: a variant returned another structure than it should."""
    found = []
    for address, output in outputs.items():
        group, _, name = address.partition("/")
        if address == misuse.VARIANT:
            found.append(_messages(address, output))
            continue
        reference, depth = REFERENCES[group]
        found.append(
            Check(
                address,
                difference(address, output, reference(config, name)),
                tolerance(depth(config)),
                "NumPy in float64, relative",
            )
        )
    return found


def difference(address: str, output: Any, expected: Any) -> float:
    """The largest over all leaves; NaN where the output has one."""
    import numpy as np

    wanted, given = leaves(expected), leaves(output)
    if [leaf.shape for leaf in given] != [leaf.shape for leaf in wanted]:
        raise TypeError(
            f"{address} returned arrays of shapes {[leaf.shape for leaf in given]}, not "
            f"{[leaf.shape for leaf in wanted]}"
        )
    errors = [
        np.abs(got - want).max() / max(np.abs(want).max(), np.finfo(np.float32).tiny)
        for got, want in zip(given, wanted, strict=True)
    ]
    return float(np.max(errors))


def _messages(address: str, output: Any) -> Check:
    """How many mistakes got no message, or one that does not say what it must."""
    if not isinstance(output, Mapping) or set(output) != set(misuse.CASES):
        raise TypeError(f"{address} returned no message for each of {', '.join(misuse.CASES)}")
    wrong = [
        name for name, (_, words) in misuse.CASES.items() if any(word not in output[name] for word in words)
    ]
    return Check(address, float(len(wrong)), 0.0, "the words that each message must have")
