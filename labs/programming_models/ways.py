"""All ways of all groups, and why one cannot run here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from labs.lab import Clock, Recorder, Step, Variant
from labs.programming_models import behaviours, chain, costs, gpt_block, rnn, training_step
from labs.programming_models.config import Config
from labs.programming_models.costs import FLOAT

NETWORKS: Mapping[str, Any] = {"training_step": training_step, "rnn_loop": rnn, "gpt_block": gpt_block}
"""Group -> its module, with NAMES, setup, reference, flops, multiplications, cost and terms."""


def variants(config: Config) -> Sequence[Variant]:
    found = []
    for size in config.sizes:
        arrays = float(FLOAT * size)
        for name in chain.NAMES:
            fused = name in ("torch_compile", "jax_jit", "numba")
            found.append(
                _variant(
                    f"chain_{size}",
                    name,
                    partial(chain.setup, size, name),
                    flops=float(chain.OPERATIONS * size),
                    bytes_moved=chain.FUSED_ARRAYS * arrays,
                    working_set=(chain.FUSED_ARRAYS if fused else 3) * arrays,
                )
            )
    for group, part in NETWORKS.items():
        for name in part.NAMES:
            threads = costs.numpy_threads(part.multiplications(config)) if name == "numpy" else 1
            setup = partial(part.setup, name)
            found.append(_variant(group, name, setup, threads=threads, flops=part.flops(config)))
    for program, names in behaviours.WAYS.items():
        for name in names:
            setup = partial(behaviours.setup, program, name)
            found.append(_variant(program, name, setup, max_rounds=1))
    return found


def _variant(group: str, name: str, setup: Callable[[Any, Recorder], Step], **rest: Any) -> Variant:
    clock: Clock = "cuda" if name in chain.CUDA else "host"  # JAX's steps wait by themselves
    if name == "jax":
        rest["threads"] = 0  # XLA cuts an operation that is large enough for all cores
    return Variant(group, name, setup, clock=clock, unavailable=unavailable(group, name), **rest)


def unavailable(group: str, name: str) -> str:
    """Why a way cannot run here, or "". Imports no framework."""
    from labs.roofline.operations import no_gpu
    from labs.vectorization.rungs import missing, missing_compiler

    if name in chain.CUDA:
        return no_gpu()
    if name in ("torch_compile", "torch_cell") and group not in behaviours.PROGRAMS:
        return missing_compiler()
    if name == "fx" or name.startswith("torch"):
        return missing("torch")
    if name.startswith("jax"):
        return missing("jax")
    if name == "numba":
        return missing("numba", "scipy") if group == "rnn_loop" else missing("numba")
    return ""
