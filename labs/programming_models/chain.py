"""An elementwise chain: a polynomial by Horner's rule, the same text for every framework.

p(x) = (...((c6 x + c5) x + c4) ... ) x + c0: six multiplications and six additions. One after the other, each
is a call and a trip over memory; fused, it is one loop that reads x and writes p.
"""

from __future__ import annotations

from typing import Any

from labs.lab import Recorder, Step
from labs.machine import Machine
from labs.programming_models import costs, jax_ways, torch_ways
from labs.programming_models.config import Config
from labs.programming_models.costs import FLOAT, Cost
from labs.unrecorded import WithoutTexts
from labs.wording import us
from labs.xla import INLINE_FLOPS

CUDA = ("torch_cuda", "cuda_graph")  # where there is a GPU
NAMES = ("torch", "torch_compile", "torch_export", "fx", "jax", "jax_jit", "numpy", "numba", *CUDA)
COEFFICIENTS = (0.75, -0.5, 0.25, 0.625, -0.375, 0.125, 0.5)
OPERATIONS = 2 * (len(COEFFICIENTS) - 1)
# The first product has one array to read, the others two; a sum has one; each writes one.
EAGER_ARRAYS = 2 + 3 * (OPERATIONS // 2 - 1) + 2 * (OPERATIONS // 2)
FUSED_ARRAYS = 2
KERNELS = {"torch_compile": 1, "jax_jit": 1}  # fused: one loop


def polynomial(x: Any) -> Any:
    value = x * COEFFICIENTS[0] + COEFFICIENTS[1]
    for coefficient in COEFFICIENTS[2:]:
        value = value * x + coefficient
    return value


def numbers(size: int) -> Any:
    """(size,) float32 in [-1, 1), the same at each call."""
    import numpy

    return numpy.random.default_rng(size).uniform(-1, 1, size).astype(numpy.float32)


def reference(size: int) -> Any:
    return polynomial(numbers(size).astype("float64"))


def setup(size: int, name: str, config: Config, recorder: Recorder) -> Step:
    x = numbers(size)
    if size != config.elements:
        recorder = WithoutTexts(recorder)  # the program is the same at each length, and shown once
    if name == "numpy":
        return lambda: polynomial(x)
    if name == "numba":
        return Loop(x, recorder)
    if name.startswith("jax"):
        import jax.numpy as jnp

        arguments = (jnp.asarray(x),)
        if name == "jax":
            return jax_ways.eager(polynomial, arguments)
        return jax_ways.Jitted(polynomial, arguments, recorder)
    import torch

    tensors = (torch.from_numpy(x),)
    if name in ("torch", "torch_cuda"):
        place = "cuda" if name == "torch_cuda" else "cpu"
        return torch_ways.Eager(polynomial, [tensor.to(place) for tensor in tensors])
    if name == "torch_compile":
        return torch_ways.Compiled(polynomial, tensors, recorder)
    make = {"torch_export": torch_ways.exported, "fx": torch_ways.traced, "cuda_graph": torch_ways.cuda_graph}
    return make[name](polynomial, tensors, recorder)


class Loop:
    """numba: the loop is written out, and LLVM compiles it at the first call."""

    def __init__(self, x: Any, recorder: Recorder) -> None:
        import numba
        import numpy

        coefficients = tuple(numpy.float32(coefficient) for coefficient in COEFFICIENTS)

        @numba.njit(fastmath={"contract"})
        def loop(x):  # type: ignore[no-untyped-def]
            out = numpy.empty_like(x)
            for place in range(x.size):
                value = x[place] * coefficients[0] + coefficients[1]
                for coefficient in coefficients[2:]:
                    value = value * x[place] + coefficient
                out[place] = value
            return out

        self._loop, self._x, self._recorder, self._compile_s = loop, x, recorder, 0.0

    def __call__(self) -> Any:
        if self._compile_s:
            return self._loop(self._x)
        begin = self._recorder.now()
        output = self._loop(self._x)
        self._compile_s = self._recorder.now() - begin
        return output

    def close(self) -> None:
        self._recorder.record("compile", self._compile_s, "s")
        self._recorder.record("graphs", len(self._loop.signatures), "")
        types = ", ".join(map(str, self._loop.signatures))
        assembly = next(iter(self._loop.inspect_asm().values()))
        loops = [line for line in assembly.splitlines() if "vmul" in line or "vfm" in line or "vadd" in line]
        self._recorder.text("compiled for", f"{types}\n\narithmetic of the loop:\n" + "\n".join(loops[:40]))


def cost(machine: Machine, size: int, name: str) -> Cost:
    array = float(FLOAT * size)
    if name in ("torch_compile", "jax_jit", "numba"):
        entry = costs.entry(machine, name)
        rate = machine.bandwidth(FUSED_ARRAYS * array)
        memory, flops = FUSED_ARRAYS * array / rate, OPERATIONS * size / machine.peak("float32")
        return Cost(
            entry + max(memory, flops),
            f"a call {us(entry)} + max({FUSED_ARRAYS} arrays at {rate / 1e9:.3g} GB/s "
            f"{us(memory)}, FMAs "
            f"{us(flops)})",
            "what entering costs beside guards: unpacking arguments, a fresh output; whether XLA's thread is "
            "still awake",
        )
    call, threads = _chain_call(machine, size, name), 0 if name == "jax" else 1
    rate = machine.bandwidth(3 * array, threads=threads)
    once, where = 0.0, ""
    if name == "torch_export":
        once, where = machine["torch_exported_call_s"], "entering the module"
    elif name == "jax" and size > INLINE_FLOPS:
        once, where = machine["jax_wake_s"], "waking XLA's thread"
    memory = EAGER_ARRAYS * array / rate
    return Cost(
        once + OPERATIONS * call + memory,
        f"{where} {us(once)} + "
        * bool(where)
        + f"{OPERATIONS} calls x {us(call)} + {EAGER_ARRAYS} arrays of "
        f"{array:.3g} B at {rate / 1e9:.3g} GB/s {us(memory)}",
        "pages: NumPy asks for huge ones, torch and JAX do not; XLA cuts an operation for all cores, whose "
        "threads must be free",
    )


def _chain_call(machine: Machine, size: int, name: str) -> float:
    """An operation of the chain, on average: seven of twelve have a Python number, which costs torch and JAX
    more; XLA hands what has more than a thousand FLOPs to a thread."""
    if name == "jax" and size > INLINE_FLOPS:
        return machine["jax_eager_array_call_s"]
    if name == "numpy":
        return costs.call(machine, name)
    numbers = OPERATIONS // 2 + 1
    others = OPERATIONS - numbers
    library = "jax" if name == "jax" else "torch"
    scalar, call = machine[f"{library}_scalar_call_s"], costs.call(machine, name)
    return (numbers * scalar + others * call) / OPERATIONS
