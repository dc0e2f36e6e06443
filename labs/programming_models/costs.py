"""What predictions of a call are made of.

  eager     operations x cost of a call + bytes of every operation / bandwidth
  captured  the same: capturing a program does not fuse it
  fused     one call + max(bytes of the fused loop / bandwidth, FLOPs / FMA peak)

A call's cost differs between frameworks and is a constant of the machine, as are what recording it for a
gradient adds and what entering a compiled function costs. Matrix products run at the rate that the
framework's library reached for square ones of their size. The formulas stand beside the programs that they
are of (``chain``, ``training_step``, ``rnn``, ``gpt_block``).
"""

from __future__ import annotations

from dataclasses import dataclass

from labs.machine import Machine
from labs.wording import us

FLOAT = 4  # bytes
BLAS_SHARES_FROM = 2**18
"""Multiplications up to which OpenBLAS, which NumPy brings, computes a product on one thread (its
``interface/gemm.c``: SMP_THRESHOLD_MIN x GEMM_MULTITHREAD_THRESHOLD)."""


@dataclass(frozen=True)
class Cost:
    """Seconds of one call of a step, the formula with its numbers, and what to suspect."""

    seconds: float
    because: str
    suspect: str


def entry(machine: Machine, name: str) -> float:
    """Entering a fused program once. A program of XLA's is handed to its thread, which must be woken."""
    if name.startswith("jax"):
        return machine["jax_call_s"] + machine["jax_wake_s"]
    return machine[{"torch_compile": "torch_compiled_call_s", "numba": "numba_array_call_s"}[name]]


def call(machine: Machine, name: str) -> float:
    """One operation of an eager program."""
    return machine[{"numpy": "numpy_call_s", "jax": "jax_eager_call_s"}.get(name, "torch_call_s")]


def computing(
    machine: Machine, name: str, flops: float, products: int, threads: int = 1
) -> tuple[float, str]:
    """``flops`` in so many products of a way's library, their calls included but for JAX, whose products one
    thread computes inside a program (``jax_ways``)."""
    if name.startswith("jax"):
        rate = machine["jax_matmul_flops"] / machine.cores
    else:
        library = "numpy" if name in ("numpy", "numba") else "torch"
        rate = machine.product_rate(flops / products, threads=threads, library=library)
    return flops / rate, f"{flops:.3g} FLOPs at {rate / 1e9:.3g} GFLOP/s {us(flops / rate)}"


def numpy_threads(multiplications: float) -> int:
    """1, or 0 (all cores) where a product has more multiplications than OpenBLAS keeps to itself."""
    return 0 if multiplications > BLAS_SHARES_FROM else 1


def numpy_bytes(machine: Machine, numbers: float, largest: float) -> tuple[float, str]:
    """Moving so many numbers in and out of operations, whose largest array has so many."""
    moved = FLOAT * numbers
    seconds = moved / machine.bandwidth(3 * FLOAT * largest)
    return seconds, f"{moved:.3g} B of every operation {us(seconds)}"


def numpy_calls(machine: Machine, reductions: int, others: int) -> tuple[float, str]:
    """Of what is no product."""
    found = [
        (reductions, "reductions", machine["numpy_reduction_call_s"]),
        (others, "calls", machine["numpy_call_s"]),
    ]
    text = " + ".join(f"{count} {what} x {us(seconds)}" for count, what, seconds in found)
    return sum(count * seconds for count, _, seconds in found), text
