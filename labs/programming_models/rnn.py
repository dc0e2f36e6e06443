"""A loop of a recurrent network: state = tanh(input + state U), each step waiting for the one before.

The loop is Python's where a framework runs it as it is; ``jit`` and ``torch.compile`` unroll it into one
program as long as the loop; ``lax.scan`` keeps it a loop inside the program; ``torch_cell`` compiles one step
and leaves the loop to Python; numba compiles the loop as it is written.
"""

from __future__ import annotations

import math
from typing import Any

from labs.lab import Recorder, Step
from labs.machine import Machine
from labs.programming_models import costs, jax_ways, torch_ways
from labs.programming_models.config import HIDDEN, ROWS, Config
from labs.programming_models.costs import Cost
from labs.wording import us

NAMES = ("torch", "torch_cell", "torch_compile", "jax", "jax_jit", "jax_scan", "numpy", "numba")
COMPILATIONS = 5  # of each jitted way, whose time to compile is claimed about


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


def reference(config: Config) -> list[Any]:
    import numpy

    there, weight = inputs(config)
    return [loop_of(numpy.tanh)(there.astype("float64"), weight.astype("float64"))]


def terms(config: Config) -> int:
    """Rounded products in a sum, the longest."""
    return HIDDEN


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
        function = scanned if name == "jax_scan" else loop_of(jnp.tanh)
        return jax_ways.Jitted(function, arguments, recorder, COMPILATIONS)
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


def multiplications(config: Config) -> int:
    """Of the largest product."""
    return ROWS * HIDDEN**2


def flops(config: Config) -> float:
    return 2.0 * (config.steps - 1) * ROWS * HIDDEN**2


def cost(config: Config, machine: Machine, name: str) -> Cost:
    steps = config.steps
    compute, _ = costs.computing(machine, name, flops(config), steps - 1)
    if name in ("jax_jit", "jax_scan"):
        inner = 2 * machine["jax_product_call_s"]
        each = f"{steps} steps x (a product and a fused kernel {us(inner)}) inside XLA"
        entry = costs.entry(machine, name)
        return Cost(
            entry + steps * inner + compute,
            f"a call {us(entry)} + {each}",
            "what XLA puts around a small product: copies of the state, a library call or a loop of its own",
        )
    if name == "numba":
        tanh = ROWS * HIDDEN * 2 * machine["libm_exp_s"]
        return Cost(
            machine["numba_call_s"] + steps * tanh + compute,
            f"{steps} steps x tanh {us(tanh)} + products by the library {us(compute)}",
            "tanh of the C library, and arrays that numba allocates in the loop",
        )
    if name == "numpy":
        tanh = ROWS * HIDDEN * 2 * machine["numpy_exp_s"]
        call, item = machine["numpy_call_s"], machine["python_item_s"]
        return Cost(
            steps * (2 * call + item + tanh) + compute,
            f"{steps} steps x (sum, tanh 2 x {us(call)} + an item {us(item)} + {us(tanh)}) + products "
            f"{us(compute)}",
            "tanh against exp, and a call that allocates its output",
        )
    if name == "jax":
        call, index = machine["jax_eager_call_s"], machine["jax_index_call_s"]
        product, wake = machine["jax_eager_array_call_s"], machine["jax_wake_s"]
        return Cost(
            steps * (index + product + 2 * call) + wake + compute,
            f"{steps} steps x (index {us(index)} + product {us(product)} + sum, tanh 2 x {us(call)}) "
            f"+ waking XLA's thread {us(wake)}",
            "operations that wait for another thread's result, and that thread",
        )
    call, later = machine["torch_call_s"], steps - 1  # the first step has no product
    product = compute / later
    if name == "torch_cell":
        entry = machine["torch_compiled_call_s"]
        return Cost(
            2 * call + later * (call + entry + product),
            f"index, tanh 2 x {us(call)} + {later} steps x (index {us(call)} + a compiled call {us(entry)} + "
            f"product {us(product)})",
            "guards, which are checked at each step, and the code around the product",
        )
    if name == "torch_compile":
        entry = machine["torch_compiled_call_s"]
        return Cost(
            entry + later * product + steps * call,
            f"a compiled call {us(entry)} + {later} x product {us(product)} + {steps} x a generated kernel "
            f"{us(call)}",
            "inductor's Python around each product and kernel",
        )
    return Cost(
        2 * call + later * (3 * call + product),
        f"index, tanh 2 x {us(call)} + {later} steps x (index, sum, tanh 3 x {us(call)} + product "
        f"{us(product)})",
        "indexing and tanh, which are none of the operations that the constant comes from",
    )
