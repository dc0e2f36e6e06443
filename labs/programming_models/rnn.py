"""A loop of a recurrent network: state = tanh(input + state U), each step waiting for the one before.

The loop is Python's where a framework runs it as it is; ``jit`` and ``torch.compile`` unroll it into one
program as long as the loop; ``lax.scan`` keeps it a loop inside the program; ``torch_cell`` compiles one step
and leaves the loop to Python; numba compiles the loop as it is written.
"""

from __future__ import annotations

import math
from typing import Any

from labs.lab import Recorder, Step
from labs.programming_models import jax_ways, torch_ways
from labs.programming_models.config import HIDDEN, ROWS, Config

NAMES = ("torch", "torch_cell", "torch_compile", "jax", "jax_jit", "jax_scan", "numpy", "numba")


def inputs(config: Config) -> tuple[Any, Any]:
    """inputs (steps, rows, hidden), which a first layer would have made, and U (hidden, hidden), float32."""
    import numpy

    random = numpy.random.default_rng(7)
    there = random.standard_normal((config.steps, ROWS, HIDDEN)).astype(numpy.float32)
    return there, (random.standard_normal((HIDDEN, HIDDEN)) / math.sqrt(HIDDEN)).astype(numpy.float32)


def loop_of(tanh: Any) -> Any:
    def loop(there: Any, weight: Any) -> Any:
        state = tanh(there[0])
        for step in range(1, there.shape[0]):
            state = tanh(there[step] + state @ weight)
        return state

    return loop


def reference(config: Config) -> Any:
    import numpy

    there, weight = inputs(config)
    return loop_of(numpy.tanh)(there.astype("float64"), weight.astype("float64"))


def setup(name: str, config: Config, recorder: Recorder) -> Step:
    import numpy

    there, weight = inputs(config)
    if name == "numpy":
        loop = loop_of(numpy.tanh)
        return lambda: loop(there, weight)
    if name == "numba":
        import numba

        inner = numba.njit(loop_of(numpy.tanh))
        return lambda: inner(there, weight)
    if name.startswith("jax"):
        import jax
        import jax.numpy as jnp

        arguments = (jnp.asarray(there), jnp.asarray(weight))

        def scanned(there: Any, weight: Any) -> Any:
            def cell(state: Any, part: Any) -> tuple[Any, None]:
                return jnp.tanh(part + state @ weight), None

            return jax.lax.scan(cell, jnp.tanh(there[0]), there[1:])[0]

        if name == "jax":
            return jax_ways.eager(loop_of(jnp.tanh), arguments)
        return jax_ways.Jitted(scanned if name == "jax_scan" else loop_of(jnp.tanh), arguments, recorder)
    import torch

    tensors = (torch.from_numpy(there), torch.from_numpy(weight))
    if name == "torch":
        return torch_ways.Eager(loop_of(torch.tanh), tensors)
    if name == "torch_compile":
        return torch_ways.Compiled(loop_of(torch.tanh), tensors, recorder)

    def cell(part: Any, state: Any, weight: Any) -> Any:
        return torch.tanh(part + state @ weight)

    def around(cell: Any) -> Any:
        def loop(there: Any, weight: Any) -> Any:
            state = torch.tanh(there[0])
            for step in range(1, there.shape[0]):
                state = cell(there[step], state, weight)
            return state

        return loop

    return torch_ways.Compiled(cell, tensors, recorder, around)
