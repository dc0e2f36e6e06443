"""Register tiles of a matrix product: the innermost loop, in vector instructions, for each unit a CPU may
have.

A tile is ``rows`` x ``columns`` sums that stay in registers while the loop runs over the common dimension.
Both factors are packed into 32-bit words, so that one loop serves two units: a word is one float32 for the
FMA unit, or two bfloat16 of consecutive k for VDPBF16PS. (AMX has a file of its own, ``cpu_amx``.)

Sources: Van Zee and van de Geijn 2015, "BLIS", section 4 (the micro-kernel and its panels); Intel 64 and
IA-32 Optimization Reference Manual, chapter on AVX-512 BF16.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.ir_vectors import FLOAT, LONG, BFloat, declare, load, pointer_at, splat, store
from kernels.simd import compiled_features


def _lanes() -> int:
    """float32 in one register."""
    features = compiled_features()
    return 16 if "avx512f" in features else 8 if "avx" in features else 4


@dataclass(frozen=True, eq=False)
class Tile:
    """A unit and how it wants its factors.

    rows, columns: of the tile. pair: consecutive k in one word (2 where words hold bfloat16 pairs).
    multiply(a, a_start, b, b_start, steps, scale, scale_start, c, c_start, c_stride): the tile's c += scale *
    (a @ b) over ``steps`` words, float32, scale a row of ``columns`` factors.
    """

    rows: int
    columns: int
    pair: int
    multiply: Callable[..., Any]


def _scaled_add(builder: Any, c: Any, value: Any, scale: Any) -> None:
    """c[...] += scale * value, vectors; c is a pointer to float32."""
    before = load(builder, c, value.type, 4)
    after = builder.fadd(before, builder.fmul(value, scale, flags=["contract"]), flags=["contract"])
    store(builder, after, c, 4)


def _vectors(builder: Any, pointer: Any, lanes: int, count: int) -> list[Any]:
    """``count`` consecutive vectors of float32."""
    kind = ir.VectorType(FLOAT, lanes)
    return [load(builder, builder.gep(pointer, [LONG(index * lanes)]), kind, 4) for index in range(count)]


def _multiply(rows: int, vectors: int, lanes: int, pairs: bool) -> Any:
    """The loop of the FMA unit, or with ``pairs`` that of VDPBF16PS (16 lanes)."""
    single = ir.VectorType(FLOAT, lanes)
    # Without the instruction llvm.fma is a call into libm; every CPU but early x86 has it.
    fused = "fma" in compiled_features() or platform.machine() not in ("x86_64", "AMD64", "i386", "i686")

    @intrinsic
    def multiply(
        typing: Any, a: Any, a_start: Any, b: Any, b_start: Any, steps: Any,
        scale: Any, scale_start: Any, c: Any, c_start: Any, c_stride: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            word = FLOAT.as_pointer()
            left = builder.bitcast(pointer_at(context, builder, signature, args, 0, args[1]), word)
            right = builder.bitcast(pointer_at(context, builder, signature, args, 2, args[3]), word)
            cells = [
                cgutils.alloca_once_value(builder, ir.Constant(single, [0.0] * lanes))
                for _ in range(rows * vectors)
            ]
            with cgutils.for_range(builder, args[4], intp=LONG) as loop:
                column = builder.gep(left, [builder.mul(loop.index, LONG(rows))])
                row = builder.gep(right, [builder.mul(loop.index, LONG(vectors * lanes))])
                values = _vectors(builder, row, lanes, vectors)
                for i in range(rows):
                    number = builder.load(builder.gep(column, [LONG(i)]))
                    factor = splat(builder, number, lanes)
                    for j, value in enumerate(values):
                        cell = cells[i * vectors + j]
                        builder.store(combine(builder, builder.load(cell), factor, value), cell)
            factors = _vectors(
                builder, pointer_at(context, builder, signature, args, 5, args[6]), lanes, vectors
            )
            for i in range(rows):
                start = builder.add(args[8], builder.mul(args[9], LONG(i)))
                out = pointer_at(context, builder, signature, args, 7, start)
                for j, factor in enumerate(factors):
                    place = builder.gep(out, [LONG(j * lanes)])
                    _scaled_add(builder, place, builder.load(cells[i * vectors + j]), factor)
            return context.get_dummy_value()

        kinds = (a, a_start, b, b_start, steps, scale, scale_start, c, c_start, c_stride)
        return types.void(*kinds), codegen

    def combine(builder: Any, total: Any, factor: Any, value: Any) -> Any:
        if pairs:
            pair = ir.VectorType(BFloat(), 2 * lanes)
            dot = declare(builder, "llvm.x86.avx512bf16.dpbf16ps.512", single, [single, pair, pair])
            return builder.call(dot, [total, builder.bitcast(factor, pair), builder.bitcast(value, pair)])
        if fused:
            fma = declare(builder, f"llvm.fma.v{lanes}f32", single, [single] * 3)
            return builder.call(fma, [factor, value, total])
        return builder.fadd(total, builder.fmul(factor, value))

    return multiply


@cache
def fma_tile() -> Tile:
    """float32 products on full registers: any CPU.

    12 x 2 vectors where there are 32 registers (AVX-512, ARM): 24 sums, 2 vectors of B and a broadcast; 6 x 2
    where there are 16.
    """
    lanes = _lanes()
    many = lanes == 16 or platform.machine() in ("aarch64", "arm64")
    rows = 12 if many else 6
    return Tile(rows, 2 * lanes, 1, _multiply(rows, 2, lanes, False))


@cache
def dot_tile() -> Tile:
    """Pairs of bfloat16 summed in float32 by VDPBF16PS, 12 x 32 at a time."""
    return Tile(12, 32, 2, _multiply(12, 2, 16, True))


def has_dots() -> bool:
    """Whether numba compiles for VDPBF16PS."""
    return {"avx512f", "avx512bf16"} <= compiled_features()
