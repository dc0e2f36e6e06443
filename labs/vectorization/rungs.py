"""What the four problems share: which frameworks are here, noting what a compiler made, and cost formulas.

A rung is one way to do a problem's work: ``python``, ``numpy``, ``numba`` (plain), ``numba_simd``,
``numba_parallel``, ``jax``, ``torch`` and what a problem adds to them.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from labs.lab import Check, Claim, Interval, Recorder, Results, at_least, values_of
from labs.machine import MMAP_THRESHOLD_BYTES, Machine

ROUNDING = 2.0**-24  # relative error of one float32 operation, at most
FLOAT_BYTES = 4


def missing(*packages: str) -> str:
    """Why a rung cannot run here, or "" when all its packages are installed."""
    absent = [name for name in packages if find_spec(name) is None]
    return f"{' and '.join(absent)} not installed" if absent else ""


def missing_compiler() -> str:
    """torch.compile writes C++ for the CPU and needs a compiler for it."""
    named = os.environ.get("CXX")
    if any(shutil.which(name) for name in (named, "g++", "clang++", "c++") if name):
        return missing("torch")
    return "torch.compile needs a C++ compiler (g++ or clang++, or CXX=...); none is on the path"


class Compiled:
    """A step that calls a numba function; when it ends, it records what the compiler had made of it: the
    widest SIMD of the deepest loops, and the counts behind it. Read from the very code that was timed."""

    def __init__(self, recorder: Recorder, function: Any, arguments: tuple[Any, ...]) -> None:
        self._recorder, self._function, self._arguments = recorder, function, arguments

    def __call__(self) -> object:
        return self._function(*self._arguments)

    def close(self) -> None:
        from kernels.inspect import inspect_function

        code = inspect_function(self._function, self._arguments)
        if code.verdict == "unknown":
            return
        self._recorder.record("vector_bits", code.vector_bits, "bit")
        self._recorder.record("packed_fma", code.packed_fma, "instructions")
        self._recorder.record("packed_arithmetic", code.packed_arithmetic, "instructions")
        self._recorder.record("scalar_arithmetic", code.scalar_arithmetic, "instructions")
        self._recorder.record("libm_calls", sum(code.libm.values()), "calls")


def vector_bits(results: Results, variant: str) -> float | None:
    """Register width that was recorded for a variant, or None where code cannot be read."""
    recorded = values_of(results, variant, "vector_bits")
    return recorded[-1] if recorded else None


# --- costs -----------------------------------------------------------------------------------------


def pass_seconds(machine: Machine, bytes_: float, working_set: float, threads: int = 1) -> float:
    """Reading and writing ``bytes_`` in all, in passes over a working set."""
    return bytes_ / machine.bandwidth(working_set, threads=threads)


def fresh_seconds(machine: Machine, block_bytes: float, blocks: int = 1) -> float:
    """New pages of numpy's large blocks, which the default allocator hands back and gets anew at each call.

    numpy asks for huge pages (madvise) for blocks from 4 MiB on: where the system grants them a fault covers
    2 MiB, and what is left of its cost is that the pages are zeroed, one write of the block.
    """
    if machine.allocator != "default" or block_bytes < MMAP_THRESHOLD_BYTES:
        return 0.0
    if "[never]" in str(machine.facts.get("transparent_huge_pages", "[never]")):
        return blocks * block_bytes * (machine.get("page_fault_s_per_byte") or 0.0)
    return pass_seconds(machine, blocks * block_bytes, blocks * block_bytes)


def inner_loop_seconds(machine: Machine, loops: float) -> float:
    """What numpy spends on starting its compiled loop anew, once per row where an operand is broadcast."""
    return loops * (machine.get("numpy_inner_loop_s") or 0.0)


def shared_seconds(machine: Machine, one_core: float, regions: int = 1) -> float:
    """Work of one core spread evenly over all, with so many starts and ends of a parallel region."""
    return one_core / machine.cores + regions * machine["numba_parallel_region_s"]


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


# --- proofs and claims -----------------------------------------------------------------------------


def compare(
    outputs: Mapping[str, object],
    group: str,
    error_of: Callable[[Any], float],
    shape: tuple[int, ...],
    tolerance: float,
    against: str,
) -> list[Check]:
    """A Check for each output of the group. An output of another shape has an infinite error."""
    import numpy as np

    checks = []
    for address, output in outputs.items():
        if address.partition("/")[0] == group:
            values = np.asarray(output)
            error = float(error_of(values)) if values.shape == shape else math.inf
            checks.append(Check(address, error, tolerance, against))
    return checks


def times_faster(results: Results, fast: str, slow: str, bound: float) -> bool | None:
    """Whether ``fast`` takes at most 1/bound of ``slow``'s time; None when either was not measured."""
    if not results.has(fast, slow):
        return None
    ratio = results.ratio(slow, fast)
    return at_least(Interval(ratio.value, ratio.low, ratio.high), bound)


def faster_claim(text: str, fast: str, slow: str, bound: float, why: str) -> Claim:
    return Claim(text, lambda results: times_faster(results, fast, slow, bound), why)
