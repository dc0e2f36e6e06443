"""Many small matrix products: a loop of calls, one call of a loop, one call of a batched product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from labs.jax_transforms import costs
from labs.jax_transforms.arrays import random, to_jax, to_torch
from labs.jax_transforms.config import Config
from labs.jax_transforms.excerpts import BATCHED
from labs.jax_transforms.staging import Staged, waited
from labs.lab import Prediction, Recorder, Step, Variant
from labs.machine import Machine
from labs.one_thread import OneThread
from labs.wording import us

GROUP, SIZE = "batched_products", 8
DEPTH = SIZE  # terms of a sum


def matrices(config: Config) -> list[Any]:
    """Two (products, 8, 8) float32 arrays."""
    return random(1, *[(config.products, SIZE, SIZE)] * 2)


def reference(config: Config, name: str) -> Any:
    left, right = (array.astype("float64") for array in matrices(config))
    return left @ right


def _jax(name: str) -> Callable[[Any, Recorder], Step]:
    def setup(config: Config, recorder: Recorder) -> Step:
        import jax
        import jax.numpy as jnp

        left, right = to_jax(matrices(config))
        if name == "loop":
            product = jax.jit(jnp.matmul)
            pairs = list(zip(left, right, strict=True))
            return waited(lambda: [product(a, b) for a, b in pairs])

        def turns(left: Any, right: Any) -> Any:
            return jax.lax.map(lambda pair: pair[0] @ pair[1], (left, right))

        if name == "map":
            return Staged(recorder, turns, left, right)
        return Staged(recorder, jax.vmap(jnp.matmul), left, right, excerpt=BATCHED)

    return setup


def _torch(name: str) -> Callable[[Any, Recorder], Step]:
    def setup(config: Config, recorder: Recorder) -> Step:
        import torch

        left, right = to_torch(matrices(config))
        pairs = list(zip(left, right, strict=True))
        batched = torch.func.vmap(torch.mm)
        steps: dict[str, Step] = {
            "torch_loop": lambda: [torch.mm(a, b) for a, b in pairs],
            "torch_bmm": lambda: torch.bmm(left, right),
            "torch_vmap": lambda: batched(left, right),
        }
        return OneThread(steps[name])

    return setup


def variants(config: Config) -> Sequence[Variant]:
    work: dict[str, Any] = dict(
        flops=2.0 * config.products * SIZE**3, bytes_moved=3.0 * costs.FLOAT * config.products * SIZE**2
    )
    found = [Variant(GROUP, name, _jax(name), threads=0, **work) for name in ("loop", "map", "vmap")]
    names = ("torch_loop", "torch_bmm", "torch_vmap")
    return [*found, *(Variant(GROUP, name, _torch(name), **work) for name in names)]


def predict(config: Config, machine: Machine) -> Sequence[Prediction]:
    count = config.products
    arithmetic = costs.small_products(machine, count, SIZE)
    call = costs.streamed_call(machine, 1.5, arithmetic / count)
    moved = 3.0 * costs.FLOAT * count * SIZE**2
    memory, alone = (moved / machine.bandwidth(moved, threads=threads) for threads in (0, 1))
    text = f"{count} x 2 x {SIZE}^3 FLOPs at the rate of scalar code {us(arithmetic)}"
    turn, wake = 3 * machine["jax_kernel_s"], machine["jax_wake_s"]
    operation, entry = machine["torch_call_s"], machine["torch_func_entry_s"] / 2  # one layer of two
    said = {
        "loop": (
            count * call + wake,
            f"{count} calls in a row x {us(call)} + waking XLA's thread {us(wake)}",
            "how long the two threads of a call keep one another waiting",
        ),
        "map": (
            costs.jitted_call(machine) + arithmetic + count * turn,
            f"{text} + {count} turns of a loop in the program x {us(turn)}",
            "how many kernels XLA makes of a turn: slices, product, update",
        ),
        "vmap": (
            costs.jitted_call(machine) + arithmetic + memory,
            f"one call, {text}, {moved:.3g} B {us(memory)}",
            "whether the batched product is vectorised over the batch, and over how many threads",
        ),
        "torch_loop": (
            count * operation + arithmetic,
            f"{count} operations x {us(operation)}, {text}",
            "torch.mm of a matrix does more than the constant's operations on one number: it asks a BLAS",
        ),
        "torch_bmm": (
            operation + arithmetic + alone,
            f"one operation, {text}",
            "the BLAS's batched product, which is not made for 8 x 8",
        ),
        "torch_vmap": (
            operation + entry + machine["torch_func_call_s"] + arithmetic + alone,
            f"one operation under torch.func, entered for {us(entry)}, {text}",
            "the BLAS's batched product, which is not made for 8 x 8",
        ),
    }
    return [Prediction(f"{GROUP}/{name}", "time_s", *item) for name, item in said.items()]
