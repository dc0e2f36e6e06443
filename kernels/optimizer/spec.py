"""Optimizers: what to time. Updates in place fit no ``Operation``; test_optimizer.py checks them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from math import prod
from typing import Any

import torch

from kernels import optimizer
from kernels.spec import Benchmark, Sized, Step

Shapes = Sequence[tuple[int, ...]]

LARGE: Shapes = [(5_000_000,)] * 8 + [(10_000_000,)]
"""50 million elements in nine tensors: far more than the caches hold."""


def transformer(width: int = 384, layers: int = 12, vocabulary: int = 5000, length: int = 256) -> Shapes:
    """The parameters of a GPT, most of them small: 148 tensors, 23 million elements."""
    layer = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    layer += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(vocabulary, width), (length, width), *layer * layers, (width,), (width,)]


def _elements(shapes: Shapes) -> int:
    return sum(prod(shape) for shape in shapes)


def _eager_ways(
    name: str, shapes: Shapes, dtype: torch.dtype, options: Mapping[str, Any], device: str
) -> dict[str, Step]:
    """Steps on the same parameters and gradients, each with states of its own."""
    params = [torch.nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    theirs = getattr(torch.optim, name)
    found: dict[str, Step] = {"kernels": getattr(optimizer, name)(params, **options).step}
    for way in ("fused", "foreach"):
        if way in signature(theirs).parameters:  # torch has no fused update of some
            found[f"torch {way}"] = theirs(params, **{way: True}, **options).step
    if len(shapes) < 16:  # Inductor takes minutes to compile an update of hundreds of tensors
        found["torch.compile"] = torch.compile(theirs(params, **options).step)
    return found


def _ways(
    name: str, shapes: Shapes, dtype: torch.dtype, options: Mapping[str, Any], device: str
) -> dict[str, Step]:
    """Every way to make the step; the compiled ones are compiled when first called."""
    found = _eager_ways(name, shapes, dtype, options, device)
    if device == "cpu" and name == "AdamW" and dtype is torch.float32:
        found["jax.jit"] = _jax_adamw(shapes, **options)
    return found


def _jax_adamw(
    shapes: Shapes,
    lr: float,
    weight_decay: float = 1e-2,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> Step:
    """AdamW as optax has it, compiled, its buffers donated: updated in place."""
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    grads = [param * 0.5 for param in params]
    states = [[jnp.zeros_like(param) for param in params] for _ in range(2)]

    def one(p: Any, g: Any, m: Any, v: Any, t: Any) -> tuple[Any, Any, Any]:
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        change = m / (1 - beta1**t) / (jnp.sqrt(v / (1 - beta2**t)) + eps)
        return p - lr * (change + weight_decay * p), m, v

    def update(params: Any, means: Any, squares: Any, grads: Any, t: Any) -> Any:
        rows = [one(*row, t) for row in zip(params, grads, means, squares, strict=True)]
        return tuple([row[index] for row in rows] for index in range(3))

    compiled = jax.jit(update, donate_argnums=(0, 1, 2))
    kept = [params, *states]
    count = 0

    def step() -> object:
        nonlocal count
        count += 1
        kept[:] = jax.block_until_ready(compiled(*kept, grads, float(count)))
        return None

    return step


def _line(
    name: str,
    label: str,
    shapes: Shapes,
    rewritten: int,
    target: float | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Benchmark:
    """rewritten: parameters and states, each read and written; the gradients are read."""
    return Benchmark(
        operation=name,
        direction="forward",
        label=label,
        dtype=dtype,
        ways=lambda device: _ways(name, shapes, dtype, options, device),
        bytes_moved=(2 * rewritten + 1) * _elements(shapes) * dtype.itemsize,
        target=target,
        rewritten=rewritten,
    )


def _lines() -> Iterator[Benchmark]:
    yield _line("AdamW", "50M in 9 tensors", LARGE, 3, 1.0, lr=1e-3)
    yield _line("AdamW", "23M in 148 tensors", transformer(), 3, lr=1e-3)
    yield _line("AdamW", "50M in 9 tensors", LARGE, 3, dtype=torch.bfloat16, lr=1e-3)
    yield _line("SGD", "momentum 23M in 148 tensors", transformer(), 2, lr=1e-3, momentum=0.9)


BENCHMARKS = list(_lines())


def _sized(name: str) -> Sized:
    def ways(rows: int, columns: int, device: str) -> tuple[int, Step, Step]:
        found = _eager_ways(name, [(rows, columns)] * 4, torch.float32, {}, device)
        return 4 * rows * columns, found["kernels"], found.get("torch fused", found["torch foreach"])

    return Sized(name, ways)


SIZED = [_sized(name) for name in ("Adadelta", "Adagrad", "Adam", "RMSprop", "SGD")]
"""AdamW runs Adam's update."""
