"""A training step of a small multilayer perceptron: loss, gradients, and parameters one SGD step on.

Every way returns the new parameters and leaves the old ones, so that each call is the same work.
"""

from __future__ import annotations

import math
from typing import Any

from labs.lab import Recorder, Step
from labs.machine import Machine
from labs.programming_models import costs, jax_ways, torch_ways
from labs.programming_models.config import Config
from labs.programming_models.costs import Cost
from labs.wording import us
from labs.xla import EAGER_GRADIENT

NAMES = ("torch", "torch_compile", "jax", "jax_jit", "numpy")
LAYERS = 3
RATE = 0.1
# Calls: torch's counted by a dispatch mode, NumPy's by a subclass of its arrays (held by tests); for
# JAX those of the text.
# The loss: a product and a sum a layer, a comparison and a product for ReLU, difference, square, mean.
LOSS_CALLS = 2 * LAYERS + 2 * (LAYERS - 1) + 3
BACKWARD_CALLS = 11  # transposes, views and second products, beside one operation for each of the forward's
LOSS_PRODUCTS = 3 * LAYERS - 1
UPDATE_CALLS = 2 * LAYERS  # parameters
KERNELS = {"torch_compile": 6, "jax_jit": 19}  # of the rest, in a quick run
NUMPY = (LOSS_PRODUCTS, LAYERS + 1, 32)
"""NumPy's step by hand: products, reductions, and everything else with a mean's division and the views."""


def parameters(config: Config) -> list[Any]:
    """weight (in, out) and bias (out,) of each layer, float32."""
    import numpy

    random, width = numpy.random.default_rng(5), config.width
    found = []
    for _ in range(LAYERS):
        found.append((random.standard_normal((width, width)) / math.sqrt(width)).astype(numpy.float32))
        found.append((0.1 * random.standard_normal(width)).astype(numpy.float32))
    return found


def examples(config: Config) -> tuple[Any, Any]:
    """inputs and targets, each (batch, width) float32."""
    import numpy

    random = numpy.random.default_rng(6)
    x, y = (random.standard_normal((config.batch, config.width)).astype(numpy.float32) for _ in range(2))
    return x, y


def loss(values: Any, x: Any, y: Any) -> Any:
    """Mean squared error of the network; torch and JAX alike."""
    for layer in range(LAYERS):
        x = x @ values[2 * layer] + values[2 * layer + 1]
        if layer < LAYERS - 1:
            x = x * (x > 0)  # ReLU, in words that all frameworks share
    difference = x - y
    return (difference * difference).mean()


def by_hand(values: Any, x: Any, y: Any) -> list[Any]:
    """The step in NumPy, its backward pass written out; float64 makes it the reference."""
    kept: list[Any] = []
    gradients: list[Any] = []
    for layer in range(LAYERS):
        kept.append(x)
        x = x @ values[2 * layer] + values[2 * layer + 1]
        if layer < LAYERS - 1:
            x = x * (x > 0)
    difference = x - y
    cost = (difference * difference).mean()
    gradient = difference * (2.0 / difference.size)
    for layer in reversed(range(LAYERS)):
        gradients = [kept[layer].T @ gradient, gradient.sum(0), *gradients]
        if layer:
            gradient = (gradient @ values[2 * layer].T) * (kept[layer] > 0)
    return [cost, *(value - RATE * slope for value, slope in zip(values, gradients, strict=True))]


def reference(config: Config) -> list[Any]:
    values = [value.astype("float64") for value in parameters(config)]
    x, y = (part.astype("float64") for part in examples(config))
    return by_hand(values, x, y)


def terms(config: Config) -> int:
    """Rounded products in a sum, the longest."""
    return 4 * config.width


def setup(name: str, config: Config, recorder: Recorder) -> Step:
    values, (x, y) = parameters(config), examples(config)
    if name == "numpy":
        return lambda: by_hand(values, x, y)
    if name.startswith("jax"):
        import jax
        import jax.numpy as jnp

        def update(values: Any, x: Any, y: Any) -> list[Any]:
            cost, slopes = jax.value_and_grad(loss)(values, x, y)
            return [cost, *(value - RATE * slope for value, slope in zip(values, slopes, strict=True))]

        arguments = ([jnp.asarray(value) for value in values], jnp.asarray(x), jnp.asarray(y))
        if name == "jax":
            return jax_ways.eager(update, arguments)
        return jax_ways.Jitted(update, arguments, recorder)
    import torch

    def around(cost_of: Any) -> Any:
        def update(values: Any, x: Any, y: Any) -> list[Any]:
            cost = cost_of(values, x, y)
            slopes = torch.autograd.grad(cost, values)
            with torch.no_grad():
                return [cost.detach(), *torch._foreach_add(values, slopes, alpha=-RATE)]

        return update

    tensors = (
        [torch.from_numpy(v).requires_grad_() for v in values],
        torch.from_numpy(x),
        torch.from_numpy(y),
    )
    if name == "torch":
        return torch_ways.Eager(around(loss), tensors)
    return torch_ways.Compiled(loss, tensors, recorder, around)


def multiplications(config: Config) -> int:
    """Of the largest product."""
    return config.batch * config.width**2


def numpy_numbers(config: Config) -> float:
    """In all operands and results of NumPy's step but the products': activations, and the update."""
    return 38.0 * config.batch * config.width + 5.0 * LAYERS * config.width**2


def flops(config: Config) -> float:
    """Of the matrix products: one forward and two backward a layer, but no gradient of the input."""
    products = 3 * LAYERS - 1
    return 2.0 * products * config.batch * config.width**2


def cost(config: Config, machine: Machine, name: str) -> Cost:
    threads = costs.numpy_threads(multiplications(config)) if name == "numpy" else 1
    compute, work = costs.computing(machine, name, flops(config), LOSS_PRODUCTS, threads)
    if name == "jax_jit":
        entry = costs.entry(machine, name)
        inner = (LOSS_PRODUCTS + KERNELS[name]) * machine["jax_product_call_s"]
        return Cost(
            entry + inner + compute,
            f"a call {us(entry)} + {LOSS_PRODUCTS} products and {KERNELS[name]} kernels {us(inner)} + {work}",
            "eight arguments are unpacked, seven outputs made; XLA spreads independent products over "
            "threads, which must be free",
        )
    if name == "jax":
        recorded, call = machine["jax_recorded_call_s"], machine["jax_eager_call_s"]
        operations, wake = EAGER_GRADIENT * LOSS_CALLS, machine["jax_wake_s"]
        return Cost(
            operations * recorded + 2 * UPDATE_CALLS * call + wake + compute,
            f"{EAGER_GRADIENT} x {LOSS_CALLS} calls of the loss with their gradient x {us(recorded)} + "
            f"{2 * UPDATE_CALLS} x {us(call)} + waking XLA's thread {us(wake)} + {work}",
            "tracing for the gradient, which JAX does again at each call without jit, depends on the "
            "operation",
        )
    if name == "numpy":
        calls, text = costs.numpy_calls(machine, *NUMPY[1:])
        moved, bytes_text = costs.numpy_bytes(machine, numpy_numbers(config), config.batch * config.width)
        return Cost(
            calls + moved + compute,
            f"{text} + {bytes_text} + {work}",
            "products that are not square; arrays that are turned first",
        )
    recorded, call = machine["torch_recorded_call_s"], machine["torch_call_s"]
    update = UPDATE_CALLS * call
    if name == "torch_compile":
        entry, kernels = machine["torch_compiled_gradient_s"], KERNELS[name] * call
        entry += (2 * LAYERS + 1) * machine["torch_compiled_array_s"]
        return Cost(
            entry + kernels + update + compute,
            f"a compiled call of {2 * LAYERS + 2} arrays and its gradient {us(entry)} + "
            f"{KERNELS[name]} kernels {us(kernels)} + {UPDATE_CALLS} updates {us(update)} + {work}",
            "guards on arguments in a list, and the autograd function around the graph",
        )
    more = BACKWARD_CALLS - LOSS_PRODUCTS  # a product's own call is in its rate; what records it is not
    calls = LOSS_CALLS * recorded + more * call
    started = machine["torch_backward_s"]
    return Cost(
        started + calls + update + compute,
        f"starting backward {us(started)} + {LOSS_CALLS} calls with their gradient x {us(recorded)} + "
        f"{more} more backward, less the products' own, x {us(call)} + "
        f"{UPDATE_CALLS} updates {us(update)} + {work}",
        "the backward of a product or a sum is several operations (transposes, sums over rows)",
    )
