"""A Pallas kernel in interpret mode beside what XLA makes of the same lines.

Interpret mode has no device to compile for: the grid becomes a loop in an ordinary XLA program, whose turns
cut a block out, compute it and put it back; XLA leaves copies of the whole array in each turn. It shows that
a kernel is right, and nothing about its speed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from labs.jax_transforms import costs
from labs.jax_transforms.arrays import random, to_jax, to_torch
from labs.jax_transforms.config import Config
from labs.jax_transforms.excerpts import interpreted
from labs.jax_transforms.staging import Staged
from labs.lab import Prediction, Recorder, Step, Variant
from labs.machine import Machine
from labs.wording import us

GROUP, BLOCK_ROWS = "softmax", 8
KERNELS_OF_A_BLOCK = 10  # slice, the softmax's passes, update, the grid's counters
KERNELS = 3


def reference(config: Config, name: str) -> Any:
    import numpy as np

    (scores,) = random(51, (config.side, config.side))
    exponentials = np.exp(scores.astype("float64") - scores.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def pallas_softmax(scores: Any) -> Any:
    """Softmax of the rows of a float32 matrix, 8 rows a block, interpreted."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas

    def kernel(scores_ref: Any, out_ref: Any) -> None:
        block = scores_ref[...]
        block = jnp.exp(block - block.max(-1, keepdims=True))
        out_ref[...] = block / block.sum(-1, keepdims=True)

    rows, columns = scores.shape
    block = pallas.BlockSpec((BLOCK_ROWS, columns), lambda place: (place, 0))
    return pallas.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(scores.shape, scores.dtype),
        grid=(rows // BLOCK_ROWS,),
        in_specs=[block],
        out_specs=block,
        interpret=True,
    )(scores)


def _jax(name: str) -> Callable[[Any, Recorder], Step]:
    def setup(config: Config, recorder: Recorder) -> Step:
        import jax

        scores = to_jax(random(51, (config.side, config.side)))[0]
        if name == "jit":
            return Staged(recorder, jax.nn.softmax, scores)
        return Staged(recorder, pallas_softmax, scores, excerpt=interpreted(config.side))

    return setup


def _torch(config: Config, recorder: Recorder) -> Step:
    import torch

    scores = to_torch(random(51, (config.side, config.side)))[0]
    out = torch.empty_like(scores)
    return lambda: torch.softmax(scores, -1, out=out)


def variants(config: Config) -> Sequence[Variant]:
    moved = 2.0 * costs.FLOAT * config.side**2
    found = [
        Variant(GROUP, name, _jax(name), bytes_moved=moved, threads=0) for name in ("jit", "pallas_interpret")
    ]
    return [*found, Variant(GROUP, "torch", _torch, bytes_moved=moved, threads=0)]


def predict(config: Config, machine: Machine) -> Sequence[Prediction]:
    numbers = config.side**2
    exponentials = numbers * machine["numpy_exp_s"]
    moved = 2.0 * costs.FLOAT * numbers
    passes = 4 * moved / 2 / machine.bandwidth(moved)
    call = costs.jitted_call(machine) + KERNELS * machine["jax_kernel_s"]
    blocks = config.side // BLOCK_ROWS
    # Each turn copies all scores twice: the loop's update of them must not change what its slice still reads.
    copies = blocks * 2 * moved / machine.bandwidth(moved)
    turns = blocks * KERNELS_OF_A_BLOCK * machine["jax_kernel_s"] + copies
    text = f"{numbers} exponentials {us(exponentials)}, 4 passes {us(passes)}"
    threads = "over how many threads XLA spreads a row-wise kernel"
    shared = (exponentials + passes) / machine.cores + 2 * (machine.get("torch_parallel_region_s") or 0.0)
    said = {
        "jit": (call + exponentials + passes, f"{text}, one thread", threads),
        "pallas_interpret": (
            call + exponentials + passes + turns,
            f"{text}, {blocks} turns that each copy {moved / 2:.3g} B twice {us(turns)}",
            "how many copies of the whole arrays XLA leaves in a turn (see the excerpt)",
        ),
        "torch": (machine["torch_call_s"] + shared, f"({text}) / {machine.cores} cores", "its exponential"),
    }
    return [Prediction(f"{GROUP}/{name}", "time_s", *item) for name, item in said.items()]
