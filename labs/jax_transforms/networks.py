"""The MLP of the lab, in JAX, in torch, and by hand in float64.

tanh layers, a linear last one, mean squared error. Parameters are one flat tuple: weight, bias, weight, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from labs.jax_transforms.arrays import random

CLASSES = 10
RATE = 0.05  # of gradient descent


def widths(inputs: int, layers: int) -> list[int]:
    """Of every activation: ``layers`` hidden layers as wide as the input, and 10 outputs."""
    return [inputs] * (layers + 1) + [CLASSES]


def parameters(sizes: Sequence[int]) -> tuple[Any, ...]:
    """(in, out) weights of variance 1 / in, and biases, float32."""
    found = []
    for place, (rows, columns) in enumerate(pairwise(sizes)):
        found += random(10 + place, (rows, columns), (columns,), scale=rows**-0.5)
    return tuple(found)


def batch(sizes: Sequence[int], count: int) -> tuple[Any, Any]:
    """Inputs (count, sizes[0]) and targets (count, 10), float32."""
    inputs, targets = random(9, (count, sizes[0]), (count, sizes[-1]))
    return inputs, targets


def loss(tanh: Any, parameters: Sequence[Any], inputs: Any, targets: Any) -> Any:
    """Mean squared error, in whatever library ``tanh`` and the arrays are of."""
    for place in range(0, len(parameters) - 2, 2):
        inputs = tanh(inputs @ parameters[place] + parameters[place + 1])
    return ((inputs @ parameters[-2] + parameters[-1] - targets) ** 2).mean()


def gradient(parameters: Sequence[Any], inputs: Any, targets: Any) -> tuple[float, list[Any]]:
    """(loss, gradient of each parameter) by the chain rule written out, in the arrays' own dtype."""
    import numpy as np

    layers = len(parameters) // 2
    kept = [inputs]
    for layer in range(layers):
        inputs = inputs @ parameters[2 * layer] + parameters[2 * layer + 1]
        inputs = np.tanh(inputs) if layer < layers - 1 else inputs
        kept.append(inputs)
    error = kept[-1] - targets
    flowing = 2 * error / error.size
    found: list[Any] = []
    for layer in reversed(range(layers)):
        if layer < layers - 1:
            flowing = flowing * (1 - kept[layer + 1] ** 2)
        found = [kept[layer].T @ flowing, flowing.sum(0), *found]
        flowing = flowing @ parameters[2 * layer].T
    return float((error**2).mean()), found


def product_flops(sizes: Sequence[int], count: int) -> float:
    """FLOPs of the products of one forward pass."""
    return 2.0 * count * sum(rows * columns for rows, columns in pairwise(sizes))


def gradient_flops(sizes: Sequence[int], count: int) -> float:
    """Forward, the gradient of every weight, and of every input but the first: near 3x forward."""
    return 3 * product_flops(sizes, count) - 2.0 * count * sizes[0] * sizes[1]


def number_of_parameters(sizes: Sequence[int]) -> int:
    return sum((rows + 1) * columns for rows, columns in pairwise(sizes))
