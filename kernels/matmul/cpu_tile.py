"""Register tiles of a matrix product: the innermost loop, in vector instructions, for each unit a CPU may
have.

A tile is ``rows`` x ``columns`` sums that stay in registers while the loop runs over the common dimension.
Both factors are packed into 32-bit words, so that one loop serves two units: a word is one float32 for the
FMA unit, or two bfloat16 of consecutive k for VDPBF16PS. The AMX tile reads the same packed words of B.

Sources: Van Zee and van de Geijn 2015, "BLIS", section 4 (the micro-kernel and its panels); Intel 64 and
IA-32 Optimization Reference Manual, chapters on AVX-512 BF16 and AMX (the pair-interleaved layout of B).
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels import peaks_matrix
from kernels.peaks import LONG, address, declare, splat
from kernels.simd import compiled_features

BYTE = ir.IntType(8)
FLOAT = ir.FloatType()


def _lanes() -> int:
    """float32 in one register."""
    features = compiled_features()
    return 16 if "avx512f" in features else 8 if "avx" in features else 4


@dataclass(frozen=True, eq=False)
class Tile:
    """A unit and how it wants its factors.

    rows, columns: of the tile. pair: consecutive k in one word (2 where words hold bfloat16 pairs). steps:
    the words of a block are a multiple of this. by_rows: A is packed (panel, row, word), else (panel, word,
    row). multiply(a, a_start, a_stride, b, b_start, steps, scale, scale_start, c, c_start, c_stride): the
    tile's c += scale * (a @ b), float32, scale a row of ``columns`` factors. begin(tiles) and end() stand
    around the products of one thread.
    """

    name: str
    rows: int
    columns: int
    pair: int
    steps: int
    by_rows: bool
    multiply: Callable[..., Any]
    begin: Callable[..., Any]
    end: Callable[..., Any]
    tiles: np.ndarray


@njit
def _no_begin(tiles: Any) -> None:
    pass


@njit
def _no_end() -> None:
    pass


def _pointer(context: Any, builder: Any, signature: Any, args: Any, index: int, start: int) -> Any:
    data = address(context, builder, signature.args[index], args[index])
    return builder.gep(data, [args[start]])


def _scaled_add(builder: Any, c: Any, value: Any, scale: Any) -> None:
    """c[...] += scale * value, vectors; c is a pointer to float32."""
    place = builder.bitcast(c, value.type.as_pointer())
    before = builder.load(place)
    before.align = 4
    after = builder.fadd(before, builder.fmul(value, scale, flags=["contract"]), flags=["contract"])
    builder.store(after, place).align = 4


def _vectors(builder: Any, pointer: Any, lanes: int, count: int) -> list[Any]:
    """``count`` consecutive vectors of float32."""
    kind = ir.VectorType(FLOAT, lanes)
    found = []
    for index in range(count):
        place = builder.gep(pointer, [LONG(index * lanes)])
        value = builder.load(builder.bitcast(place, kind.as_pointer()))
        value.align = 4
        found.append(value)
    return found


def _multiply(rows: int, vectors: int, lanes: int, pairs: bool) -> Any:
    """The loop of the FMA unit, or with ``pairs`` that of VDPBF16PS (16 lanes)."""
    single = ir.VectorType(FLOAT, lanes)
    # Without the instruction llvm.fma is a call into libm; every CPU but early x86 has it.
    fused = "fma" in compiled_features() or platform.machine() not in ("x86_64", "AMD64", "i386", "i686")

    @intrinsic
    def multiply(
        typing: Any, a: Any, a_start: Any, a_stride: Any, b: Any, b_start: Any, steps: Any,
        scale: Any, scale_start: Any, c: Any, c_start: Any, c_stride: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            word = FLOAT.as_pointer()
            left = builder.bitcast(_pointer(context, builder, signature, args, 0, 1), word)
            right = builder.bitcast(_pointer(context, builder, signature, args, 3, 4), word)
            cells = [
                cgutils.alloca_once_value(builder, ir.Constant(single, [0.0] * lanes))
                for _ in range(rows * vectors)
            ]
            with cgutils.for_range(builder, args[5], intp=LONG) as loop:
                column = builder.gep(left, [builder.mul(loop.index, LONG(rows))])
                row = builder.gep(right, [builder.mul(loop.index, LONG(vectors * lanes))])
                values = _vectors(builder, row, lanes, vectors)
                for i in range(rows):
                    number = builder.load(builder.gep(column, [LONG(i)]))
                    factor = splat(builder, number, lanes)
                    for j, value in enumerate(values):
                        cell = cells[i * vectors + j]
                        builder.store(combine(builder, builder.load(cell), factor, value), cell)
            factors = _vectors(builder, _pointer(context, builder, signature, args, 6, 7), lanes, vectors)
            for i in range(rows):
                start = builder.add(args[9], builder.mul(args[10], LONG(i)))
                out = builder.gep(address(context, builder, signature.args[8], args[8]), [start])
                for j, factor in enumerate(factors):
                    place = builder.gep(out, [LONG(j * lanes)])
                    _scaled_add(builder, place, builder.load(cells[i * vectors + j]), factor)
            return context.get_dummy_value()

        kinds = (a, a_start, a_stride, b, b_start, steps, scale, scale_start, c, c_start, c_stride)
        return types.void(*kinds), codegen

    def combine(builder: Any, total: Any, factor: Any, value: Any) -> Any:
        if pairs:
            pair = ir.VectorType(peaks_matrix.BFloat(), 2 * lanes)
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
    return Tile(
        "fma", rows, 2 * lanes, 1, 1, False, _multiply(rows, 2, lanes, False), _no_begin, _no_end,
        np.zeros(64, np.uint8),
    )  # fmt: skip


@cache
def dot_tile() -> Tile:
    """Pairs of bfloat16 summed in float32 by VDPBF16PS, 12 x 32 at a time."""
    return Tile(
        "AVX-512 VDPBF16PS", 12, 32, 2, 1, False, _multiply(12, 2, 16, True), _no_begin, _no_end,
        np.zeros(64, np.uint8),
    )  # fmt: skip


@cache
def bfloat16_tile() -> Tile | None:
    """The best bfloat16 unit of this CPU that this process may use, or None."""
    features = compiled_features()
    if {"amx-tile", "amx-bf16", "avx512f"} <= features and not peaks_matrix.amx_unavailable():
        return amx_tile()
    return dot_tile() if {"avx512f", "avx512bf16"} <= features else None


# --- AMX -----------------------------------------------------------------------------------------


def _tile_call(builder: Any, name: str, kinds: list[Any], values: list[Any]) -> None:
    builder.call(declare(builder, f"llvm.x86.{name}", ir.VoidType(), kinds), values)


@intrinsic
def _configure(typing: Any, tiles: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = address(context, builder, signature.args[0], args[0])
        _tile_call(builder, "ldtilecfg", [BYTE.as_pointer()], [builder.bitcast(data, BYTE.as_pointer())])
        return context.get_dummy_value()

    return types.void(tiles), codegen


@intrinsic
def _release(typing: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _tile_call(builder, "tilerelease", [], [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _multiply_amx(
    typing: Any, a: Any, a_start: Any, a_stride: Any, b: Any, b_start: Any, steps: Any,
    scale: Any, scale_start: Any, c: Any, c_start: Any, c_stride: Any,
) -> Any:  # fmt: skip
    """32 x 32 sums in tiles 0 to 3; 4 and 5 hold 16 words of A's halves, 6 and 7 of B's."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = BYTE.as_pointer()

        def move(name: str, tile: int, place: Any, stride_bytes: Any) -> None:
            values = [BYTE(tile), builder.bitcast(place, pointer), stride_bytes]
            _tile_call(builder, name, [BYTE, pointer, LONG], values)

        left = _pointer(context, builder, signature, args, 0, 1)
        right = _pointer(context, builder, signature, args, 3, 4)
        stride = args[2]
        sums = cgutils.alloca_once(builder, ir.ArrayType(FLOAT, 32 * 32))
        sums.align = 64
        sums = builder.bitcast(sums, FLOAT.as_pointer())
        for tile in range(4):
            _tile_call(builder, "tilezero", [BYTE], [BYTE(tile)])
        with cgutils.for_range(builder, builder.sdiv(args[5], LONG(16)), intp=LONG) as loop:
            above = builder.gep(left, [builder.mul(loop.index, LONG(16))])
            beside = builder.gep(right, [builder.mul(loop.index, LONG(16 * 32))])
            for half in range(2):
                rows = builder.gep(above, [builder.mul(stride, LONG(16 * half))])
                move("tileloadd64", 4 + half, rows, builder.mul(stride, LONG(4)))
                move("tileloadd64", 6 + half, builder.gep(beside, [LONG(16 * half)]), LONG(128))
            for tile in range(4):
                operands = [BYTE(tile), BYTE(4 + tile // 2), BYTE(6 + tile % 2)]
                _tile_call(builder, "tdpbf16ps", [BYTE] * 3, operands)
        for tile in range(4):
            place = builder.gep(sums, [LONG(16 * 32 * (tile // 2) + 16 * (tile % 2))])
            move("tilestored64", tile, place, LONG(128))
        factors = _vectors(builder, _pointer(context, builder, signature, args, 6, 7), 16, 2)
        with cgutils.for_range(builder, LONG(32), intp=LONG) as loop:
            values = _vectors(builder, builder.gep(sums, [builder.mul(loop.index, LONG(32))]), 16, 2)
            start = builder.add(args[9], builder.mul(args[10], loop.index))
            out = builder.gep(address(context, builder, signature.args[8], args[8]), [start])
            for j, (factor, value) in enumerate(zip(factors, values, strict=True)):
                _scaled_add(builder, builder.gep(out, [LONG(16 * j)]), value, factor)
        return context.get_dummy_value()

    kinds = (a, a_start, a_stride, b, b_start, steps, scale, scale_start, c, c_start, c_stride)
    return types.void(*kinds), codegen


@cache
def amx_tile() -> Tile:
    """Four accumulator tiles, 32 x 32; ``peaks_matrix.amx_unavailable()`` must have been asked first."""
    tiles = peaks_matrix.tile_config()
    return Tile("AMX TDPBF16PS", 32, 32, 2, 16, True, _multiply_amx, _configure, _release, tiles)
