"""Arrays between NumPy, JAX and torch, and what a step returned as one vector.

A tuple is a structure (the leaves of a gradient). A list has one entry for each turn of a Python loop, and
stands for the same structure whose leaves have the turns as their first axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def random(seed: int, *shapes: Sequence[int], scale: float = 1.0) -> list[Any]:
    """Normal float32 NumPy arrays, the same for a seed at each call."""
    import numpy as np

    generator = np.random.default_rng(seed)
    return [scale * generator.standard_normal(tuple(shape), dtype=np.float32) for shape in shapes]


def to_jax(arrays: Any) -> Any:
    """Copies on the CPU, also where JAX has a GPU, which no constant here is about.

    Of NumPy's memory JAX might only make a view, which cannot be donated.
    """
    import jax

    device = jax.devices("cpu")[0]
    return jax.tree.map(lambda array: jax.device_put(jax.numpy.array(array), device), arrays)


def to_torch(arrays: Any) -> Any:
    """Copies: a step that writes in place must not change another's input."""
    import torch

    if isinstance(arrays, (tuple, list)):
        return type(arrays)(to_torch(each) for each in arrays)
    return torch.tensor(arrays)


def leaves(output: Any) -> list[Any]:
    """NumPy arrays in float64."""
    import numpy as np

    if isinstance(output, list):
        return [np.stack(same) for same in zip(*(leaves(each) for each in output), strict=True)]
    if isinstance(output, tuple):
        return [leaf for each in output for leaf in leaves(each)]
    if hasattr(output, "detach"):
        output = output.detach().numpy()
    return [np.asarray(output, dtype=np.float64)]


def vector(output: Any) -> Any:
    """All numbers of an output, one after the other, float64."""
    import numpy as np

    return np.concatenate([leaf.reshape(-1) for leaf in leaves(output)])
