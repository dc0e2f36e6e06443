"""Micro-kernels for the bfloat16 matrix units of a CPU: AVX-512 VDPBF16PS and AMX TDPBF16PS.

Like ``peaks.py``: operands in registers or tiles, chains enough to hide the latency, nothing to optimise
away. Compiled on demand, since LLVM refuses instructions that the host lacks.

Source: Intel 64 and IA-32 Optimization Reference Manual, chapter on AMX (TDPBF16PS: 16 cycles a tile).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.amx import amx_unavailable, emit, tile_config
from kernels.ir_vectors import BYTE, LONG, BFloat, address, declare, splat, total
from kernels.peaks import BITS, CHAINS, FEATURES

FLOPS_DOT_BF16 = 2 * 32 * CHAINS  # 16 lanes, two products each
HAS_DOT_BF16 = bool(FEATURES.get("avx512bf16")) and BITS == 512


@intrinsic
def _dot_bf16(typingctx: Any, iterations: Any) -> Any:
    """x += a1 b1 + a2 b2 on 16 float lanes (VDPBF16PS), ``CHAINS`` chains."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        single = ir.VectorType(ir.FloatType(), 16)
        pair = ir.VectorType(BFloat(), 32)
        dot = declare(builder, "llvm.x86.avx512bf16.dpbf16ps.512", single, [single, pair, pair])
        word = builder.trunc(args[0], ir.IntType(32))  # known only at run time: nothing to fold
        bits = builder.or_(builder.and_(word, ir.IntType(32)(0x007F007F)), ir.IntType(32)(0x3C003C00))
        operand = builder.bitcast(splat(builder, bits, 16), pair)
        cells = [
            cgutils.alloca_once_value(builder, splat(builder, ir.FloatType()(float(chain)), 16))
            for chain in range(CHAINS)
        ]
        with cgutils.for_range(builder, args[0], intp=LONG):
            for cell in cells:
                builder.store(builder.call(dot, [builder.load(cell), operand, operand]), cell)
        return total(builder, [builder.load(cell) for cell in cells], 16)

    return types.float32(types.int64), codegen


def _compile_dot_bf16() -> Any:
    @njit("f4(i8)", nogil=True)
    def dot_bf16(iterations: Any) -> Any:
        return _dot_bf16(iterations)

    return dot_bf16


TILES = 4  # accumulator tiles; two operand tiles of A and two of B
FLOPS_TILES = TILES * 2 * 16 * 16 * 32


def emit_tiles(builder: Any, iterations: Any, config: Any, operand: Any) -> None:
    """IR of ``iterations`` times four independent TDPBF16PS. config, operand: i8 pointers.

    Everything from configuration to release is one straight piece of code, so that no call can
    disturb the tiles in between.
    """
    pointer = BYTE.as_pointer()
    emit(builder, "ldtilecfg", [pointer], [config])
    for tile in range(TILES):
        emit(builder, "tilezero", [BYTE], [BYTE(tile)])
    for tile in range(TILES, TILES + 4):
        emit(builder, "tileloadd64", [BYTE, pointer, LONG], [BYTE(tile), operand, LONG(64)])
    with cgutils.for_range(builder, iterations, intp=LONG):
        for tile in range(TILES):
            emit(builder, "tdpbf16ps", [BYTE] * 3, [BYTE(tile), BYTE(4 + tile // 2), BYTE(6 + tile % 2)])
    emit(builder, "tilestored64", [BYTE, pointer, LONG], [BYTE(0), operand, LONG(64)])
    emit(builder, "tilerelease", [], [])


@intrinsic
def _tiles(typingctx: Any, iterations: Any, config: Any, operand: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointers = [
            builder.bitcast(address(context, builder, kind, array), BYTE.as_pointer())
            for kind, array in zip(signature.args[1:], args[1:], strict=True)
        ]
        emit_tiles(builder, args[0], *pointers)
        return context.get_dummy_value()

    return types.void(types.int64, config, operand), codegen


def _compile_tiles() -> Any:
    @njit("void(i8, u1[::1], u2[::1])", nogil=True)
    def tiles(iterations: Any, config: Any, operand: Any) -> None:
        _tiles(iterations, config, operand)

    return tiles


def matrix_bfloat16() -> tuple[Callable[[int], object], int, str] | None:
    """``(function(iterations), flops of one iteration, name)`` of the bf16 matrix unit, or None.

    AMX tiles where CPU and kernel allow them, else the AVX-512 dot product. Compiled on demand,
    because LLVM refuses the instructions where the CPU lacks them.
    """
    if not amx_unavailable():
        compiled, config = _compile_tiles(), tile_config()

        def tiles(iterations: int) -> None:
            operand = np.full(16 * 32, 0x3C01, np.uint16)  # small bf16 numbers, one tile
            compiled(iterations, config, operand)

        return tiles, FLOPS_TILES, "AMX TDPBF16PS"
    if HAS_DOT_BF16:
        return _compile_dot_bf16(), FLOPS_DOT_BF16, "AVX-512 VDPBF16PS"
    return None
