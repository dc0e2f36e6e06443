"""A training step of a small multilayer perceptron: loss, gradients, and parameters one SGD step on.

Every way returns the new parameters and leaves the old ones, so that each call is the same work.
"""

from __future__ import annotations

import math
from typing import Any

from labs.lab import Recorder, Step
from labs.programming_models import jax_ways, torch_ways
from labs.programming_models.config import Config

NAMES = ("torch", "torch_compile", "jax", "jax_jit", "numpy")
LAYERS = 3
RATE = 0.1


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
