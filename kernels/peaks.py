"""Micro-kernels that reach one limit of a CPU each: FMA units, packed code, copy and read streams, calls.

They hold the ceilings that every other figure is compared with, so nothing is left to the optimiser:
the vectors are written out in LLVM IR at the width of the host's registers, because LLVM picks 256 bits
on many AVX-512 machines, and every loop carries a dependence that forbids dropping work. (A read loop
left to the compiler once reported 1,800 GB/s: the sum had been computed once.)

All functions are numba-compiled, release the GIL and are cached on disk. ``repeats`` or ``iterations``
is how often the loop body runs; the operations of one iteration are given by the constants below.
Timing is not done here.

Matrix units are in ``peaks_matrix.py``.

Sources: Intel 64 and IA-32 Optimization Reference Manual (FMA latency and ports); LLVM Language Reference.
"""

from __future__ import annotations

import platform

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.compiled_cache import njit_kept
from kernels.ir_vectors import LONG, address, declare, splat, total
from kernels.simd import exp_float32, full_width

CHAINS = 12  # independent accumulators: more than latency x units (4 x 2), few enough for 16 registers
STREAMS = 8  # vectors in flight in the copy and read loops
PAGE_BYTES = 4096


def host_features() -> dict[str, bool]:
    """Instruction-set extensions of this CPU by LLVM's names; empty where LLVM cannot tell."""
    try:
        return dict(llvm.get_host_cpu_features())
    except RuntimeError:
        return {}


def register_bits() -> int:
    """Width of the widest SIMD register in bits: 512, 256 or 128 (SSE, NEON)."""
    features = host_features()
    if features.get("avx512f"):
        return 512
    return 256 if features.get("avx") else 128


FEATURES = host_features()
BITS = register_bits()
LANES32 = BITS // 32
LANES64 = BITS // 64
# Without the instruction llvm.fma is a call into libm; every CPU but early x86 has it.
FUSED = bool(FEATURES.get("fma")) or platform.machine() not in ("x86_64", "AMD64", "i386", "i686")


# --- arithmetic ------------------------------------------------------------------------------------


def _fma_chains(scalar, lanes, chains):
    """Intrinsic ``(iterations, factor, addend) -> sum``: x = x * factor + addend in each chain."""

    @intrinsic
    def run(typingctx, iterations, factor, addend):
        def codegen(context, builder, signature, args):
            element = ir.FloatType() if scalar is types.float32 else ir.DoubleType()
            kind = element if lanes == 1 else ir.VectorType(element, lanes)
            short = "f32" if scalar is types.float32 else "f64"
            name = f"llvm.fma.{short}" if lanes == 1 else f"llvm.fma.v{lanes}{short}"
            factor, addend = (splat(builder, value, lanes) for value in args[1:])
            cells = []
            for chain in range(chains):  # different starts, or equal chains would be merged into one
                start = builder.fadd(args[2], element(float(chain)))
                cells.append(cgutils.alloca_once_value(builder, splat(builder, start, lanes)))
            with cgutils.for_range(builder, args[0], intp=LONG):
                for cell in cells:
                    value = builder.load(cell)
                    if FUSED:
                        value = builder.call(
                            declare(builder, name, kind, [kind] * 3), [value, factor, addend]
                        )
                    else:
                        value = builder.fadd(builder.fmul(value, factor), addend)
                    builder.store(value, cell)
            return total(builder, [builder.load(cell) for cell in cells], lanes)

        return scalar(types.int64, scalar, scalar), codegen

    return run


_fma32 = _fma_chains(types.float32, LANES32, CHAINS)
_fma64 = _fma_chains(types.float64, LANES64, CHAINS)
_fma_scalar = _fma_chains(types.float32, 1, CHAINS)
_fma_one = _fma_chains(types.float32, 1, 1)

FLOPS_FMA32 = 2 * LANES32 * CHAINS  # of one iteration
FLOPS_FMA64 = 2 * LANES64 * CHAINS
FLOPS_SCALAR = 2 * CHAINS


@njit_kept("f4(i8)", nogil=True)
def fma32(iterations):
    """float32 FMAs on full registers, ``CHAINS`` independent chains."""
    return _fma32(iterations, np.float32(0.999), np.float32(0.001))


@njit_kept("f8(i8)", nogil=True)
def fma64(iterations):
    return _fma64(iterations, 0.999, 0.001)


@njit_kept("f4(i8)", nogil=True)
def fma_scalar(iterations):
    """The same chains on single floats: the most that compiled code without SIMD can do."""
    return _fma_scalar(iterations, np.float32(0.999), np.float32(0.001))


@njit_kept("f4(i8)", nogil=True)
def fma_latency(iterations):
    """One dependent scalar FMA an iteration."""
    return _fma_one(iterations, np.float32(0.999), np.float32(0.001))


@njit_kept("f4(i8)", nogil=True)
def add_latency(iterations):
    """One dependent scalar float32 addition an iteration; some CPUs add in fewer cycles than they fuse."""
    total = np.float32(0)
    for _ in range(iterations):
        total += np.float32(1e-3)
    return total


# --- packed code -----------------------------------------------------------------------------------


@njit_kept("void(f4[::1], f4[::1], i8)", nogil=True, error_model="numpy", fastmath={"contract"})
def packed_exp(target, source, repeats):
    """target = exp(-source) by ``simd``'s arithmetic on full registers: beside FMAs also comparisons,
    selections, integers, loads and stores, which have fewer units."""
    full_width()
    for _ in range(repeats):
        shift = target[0] * np.float32(1e-30)  # from the last pass: none can be left out
        for place in range(source.size):
            target[place] = exp_float32(shift - source[place])


@njit_kept("void(f4[::1], f4[::1], i8)", nogil=True, error_model="numpy", fastmath={"contract"})
def packed_division(target, source, repeats):
    """target = 1.5 / source on full registers."""
    full_width()
    for _ in range(repeats):
        dividend = np.float32(1.5) + target[0] * np.float32(1e-30)
        for place in range(source.size):
            target[place] = dividend / source[place]


# --- streams ---------------------------------------------------------------------------------------


@intrinsic
def _scale(typingctx, target, source, factor):
    """target[i] = source[i] * factor with plain vector stores.

    A multiplication, because LLVM turns a bare copy loop into memcpy, which bypasses the caches for
    large sizes. Lengths must be a multiple of ``STREAMS * LANES32``.
    """

    def codegen(context, builder, signature, args):
        vector = ir.VectorType(ir.FloatType(), LANES32)
        out, data = (address(context, builder, signature.args[k], args[k]) for k in range(2))
        size = context.make_array(signature.args[1])(context, builder, args[1]).nitems
        factor = splat(builder, args[2], LANES32)
        step = LONG(STREAMS * LANES32)
        with cgutils.for_range_slice(builder, LONG(0), size, step, LONG, inc=True) as (index, _):
            for stream in range(STREAMS):
                place = builder.add(index, LONG(stream * LANES32))
                value = builder.load(builder.bitcast(builder.gep(data, [place]), vector.as_pointer()))
                value.align = 4
                store = builder.store(
                    builder.fmul(value, factor),
                    builder.bitcast(builder.gep(out, [place]), vector.as_pointer()),
                )
                store.align = 4
        return context.get_dummy_value()

    return types.void(target, source, types.float32), codegen


@intrinsic
def _read(typingctx, source, start):
    """Sum of ``source`` added to ``start``, in ``STREAMS`` vector accumulators."""

    def codegen(context, builder, signature, args):
        vector = ir.VectorType(ir.FloatType(), LANES32)
        data = address(context, builder, signature.args[0], args[0])
        size = context.make_array(signature.args[0])(context, builder, args[0]).nitems
        cells = [cgutils.alloca_once_value(builder, splat(builder, args[1], LANES32)) for _ in range(STREAMS)]
        step = LONG(STREAMS * LANES32)
        with cgutils.for_range_slice(builder, LONG(0), size, step, LONG, inc=True) as (index, _):
            for stream, cell in enumerate(cells):
                place = builder.add(index, LONG(stream * LANES32))
                value = builder.load(builder.bitcast(builder.gep(data, [place]), vector.as_pointer()))
                value.align = 4
                builder.store(builder.fadd(builder.load(cell), value), cell)
        return total(builder, [builder.load(cell) for cell in cells], LANES32)

    return types.float32(source, types.float32), codegen


@njit_kept("void(f4[::1], f4[::1], i8)", nogil=True)
def copy(target, source, repeats):
    """``repeats`` passes of target = 1.0001 * source, float32 of a multiple of ``STREAMS * LANES32``."""
    for _ in range(repeats):
        _scale(target, source, np.float32(1.0001))


@njit_kept("f4(f4[::1], i8)", nogil=True)
def read(source, repeats):
    """``repeats`` passes that each start from the sum of the last: none can be left out."""
    total = np.float32(0)
    for _ in range(repeats):
        total = _read(source, total * np.float32(1e-6))
    return total


@njit_kept("void(u1[::1])", nogil=True)
def touch(memory):
    """Write one byte of each page."""
    for place in range(0, memory.size, PAGE_BYTES):
        memory[place] = 1


@njit_kept("void(f4[::1], i8)", nogil=True)
def fill(values, seed):
    """Random numbers in [0.5, 1.5): never zeros, which some memory systems treat better."""
    state = np.uint64(seed * 2 + 1)
    for place in range(values.size):
        state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
        values[place] = np.float32(0.5) + np.float32(state >> np.uint64(40)) * np.float32(2.0**-24)


# --- calls -----------------------------------------------------------------------------------------


@njit_kept("f4(f4[::1])", nogil=True)
def call(values):
    """What an njit call costs: one array in, one number out."""
    return values[0]


@njit_kept("void(f4[::1])", parallel=True, nogil=True)
def region(values):
    """A parallel loop with one trivial iteration a core."""
    for place in prange(values.size):
        values[place] = np.float32(place)


@njit_kept("f4(f4[::1], i8)", nogil=True, error_model="numpy")
def libm_exp(values, repeats):
    """Scalar expf of every value, ``repeats`` times: numba's wheels have no vector math library."""
    total = np.float32(0)
    for _ in range(repeats):
        shift = total * np.float32(1e-9)  # from the last pass: none can be left out
        for place in range(values.size):
            total += np.exp(-values[place] - shift)
    return total
