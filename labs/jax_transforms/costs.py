"""What predictions are made of: dispatch, products, kernels, new pages.

jitted call  = call + arrays x cost of an array + waking XLA's thread and its answer (from 1000 FLOPs on)
calls in a row = the slower of dispatching one and handing it over, and of computing the one before
program      = FLOPs / rate of the library's product + kernels x start of a kernel + bytes / bandwidth; a
               small product has one core's share of the rate, a large one two hand-overs between threads
torch        = operations x cost of an operation (plain, under autograd, under torch.func) + FLOPs / rate, and
               once what starting autograd's engine or entering torch.func's layers costs
"""

from __future__ import annotations

from labs.machine import Machine
from labs.xla import INLINE_FLOPS

FLOAT = 4  # bytes


def jitted_call(machine: Machine, arrays: float = 1.0, flops: float = INLINE_FLOPS) -> float:
    """Seconds of a call before and after its arithmetic. arrays: pairs of one that goes in and one that
    comes out; half a pair for one of the two."""
    seconds = machine["jax_call_s"] + max(arrays - 1, 0.0) * machine["jax_array_s"]
    return seconds + (machine["jax_wake_s"] if flops >= INLINE_FLOPS else 0.0)


def streamed_call(machine: Machine, arrays: float, inside: float) -> float:
    """Seconds of one of many calls in a row, nobody waiting between them: while XLA's thread computes one for
    ``inside`` seconds, the caller dispatches the next and hands it over; the slower of the two decides."""
    return max(jitted_call(machine, arrays, flops=0) + machine["jax_handover_s"], inside)


SHARED_FROM = 4e6  # FLOPs of a product: a smaller one runs on one thread


def product_seconds(machine: Machine, flops: float, products: float) -> float:
    """``flops`` in so many products of JAX's. A large one is divided: the others are woken and waited for."""
    if machine.cores == 1 or flops / products < SHARED_FROM:
        return flops / machine["jax_matmul_flops"] * machine.cores
    return flops / machine["jax_matmul_flops"] + products * 2 * machine["thread_switch_s"]


def program(machine: Machine, flops: float, products: float, kernels: float, bytes_: float = 0.0) -> float:
    """Seconds inside a compiled program. bytes_: read and written beside what products need."""
    memory = bytes_ / machine.bandwidth(bytes_, threads=0) if bytes_ else 0.0
    arithmetic = product_seconds(machine, flops, products)
    return arithmetic + kernels * machine["jax_kernel_s"] + memory


def torch_program(
    machine: Machine,
    flops: float,
    operations: float,
    kind: str = "",
    bytes_: float = 0.0,
    *,
    products: float,
    threads: int = 0,
) -> float:
    """Seconds of so many torch operations. kind: "" (forward only), "recorded" (and backward) or "func".

    products: that the FLOPs are in. threads: 1, or 0 for all cores.
    """
    call = machine[f"torch_{kind}_call_s" if kind else "torch_call_s"]
    once = {"recorded": "torch_backward_s", "func": "torch_func_entry_s"}
    entry = machine[once[kind]] if kind else 0.0
    memory = bytes_ / machine.bandwidth(bytes_, threads=threads) if bytes_ else 0.0
    return (
        entry + operations * call + flops / machine.product_rate(flops / products, threads=threads) + memory
    )


def small_products(machine: Machine, count: float, size: int) -> float:
    """Products too small for blocking: a multiplication and an addition at a time, as scalar code."""
    return count * 2 * size**3 / machine["scalar_float32_flops"]
