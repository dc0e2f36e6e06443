"""One more row and column, and a call takes several times as long.

XLA's client for CPUs runs a program of fewer than 1000 FLOPs on the caller's thread and hands any other to a
thread of its own: a product of 7 x 7 matrices has 686 FLOPs, one of 8 x 8 has 1024. It shows
where every call is waited for, as here; calls in a row go over in a stream, and the other thread stays awake.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from labs.jax_transforms import costs
from labs.jax_transforms.arrays import random, to_jax
from labs.jax_transforms.config import Config
from labs.lab import Prediction, Recorder, Step, Variant
from labs.machine import Machine
from labs.wording import us
from labs.xla import INLINE_FLOPS

GROUP = "dispatch"
SIDES = {"inline_7x7": 7, "handed_over_8x8": 8}


def reference(config: Config, name: str) -> Any:
    left, right = (array.astype("float64") for array in random(61, *[(SIDES[name], SIDES[name])] * 2))
    return left @ right


def _setup(side: int) -> Callable[[Any, Recorder], Step]:
    def setup(config: Config, recorder: Recorder) -> Step:
        import jax

        left, right = to_jax(random(61, *[(side, side)] * 2))
        product = jax.jit(lambda a, b: a @ b)
        return lambda: product(left, right).block_until_ready()

    return setup


def variants(config: Config) -> Sequence[Variant]:
    return [Variant(GROUP, name, _setup(side), 2.0 * side**3, threads=0) for name, side in SIDES.items()]


def predict(config: Config, machine: Machine) -> Sequence[Prediction]:
    found = []
    for name, side in SIDES.items():
        flops = 2 * side**3
        inline = flops < INLINE_FLOPS
        call = costs.jitted_call(machine, 1.5, flops=0)
        seconds = call + (0.0 if inline else machine["jax_wait_s"]) + costs.small_products(machine, 1, side)
        handed = "" if inline else f" + handing over and waiting {us(machine['jax_wait_s'])}"
        found.append(
            Prediction(
                f"{GROUP}/{name}",
                "time_s",
                seconds,
                f"{flops} FLOPs: a call {us(call)}{handed}",
                "whether the other thread is awake: it sleeps between calls that are far apart",
            )
        )
    return found
