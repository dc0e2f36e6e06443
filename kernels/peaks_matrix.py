"""Micro-kernels for the bfloat16 matrix units of a CPU: AVX-512 VDPBF16PS and AMX TDPBF16PS.

Like ``peaks.py``: operands in registers or tiles, chains enough to hide the latency, nothing to optimise
away. Compiled on demand, since LLVM refuses instructions that the host lacks.

Sources: Intel 64 and IA-32 Optimization Reference Manual, chapter on AMX (TDPBF16PS: 16 cycles a tile);
Linux Documentation/arch/x86/xstate.rst (permission to use tile data: ``arch_prctl``).
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.peaks import BITS, CHAINS, FEATURES, LONG, address, declare, splat, total

BYTE = ir.IntType(8)


class BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:  # llvmlite compares types, not their names
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


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
_ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA, _SYS_ARCH_PRCTL = 0x1023, 18, 158


def amx_unavailable() -> str:
    """Why bf16 tiles cannot be used by this process, or "" after the kernel has given permission."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "AMX needs x86-64 Linux"
    if not (FEATURES.get("amx-bf16") and FEATURES.get("amx-tile")):
        return "this CPU has no AMX bf16 tiles"
    call = ctypes.CDLL(None, use_errno=True).syscall
    if call(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA):
        return f"the kernel refused tile data: {os.strerror(ctypes.get_errno())}"
    return ""


def emit_tiles(builder: Any, iterations: Any, config: Any, operand: Any) -> None:
    """IR of ``iterations`` times four independent TDPBF16PS. config, operand: i8 pointers.

    Everything from configuration to release is one straight piece of code, so that no call can
    disturb the tiles in between. Tile numbers are immediates; the state is this thread's alone.
    """
    void, pointer = ir.VoidType(), BYTE.as_pointer()

    def call(name: str, kinds: list[Any], values: list[Any]) -> None:
        builder.call(declare(builder, f"llvm.x86.{name}", void, kinds), values)

    call("ldtilecfg", [pointer], [config])
    for tile in range(TILES):
        call("tilezero", [BYTE], [BYTE(tile)])
    for tile in range(TILES, TILES + 4):
        call("tileloadd64", [BYTE, pointer, LONG], [BYTE(tile), operand, LONG(64)])
    with cgutils.for_range(builder, iterations, intp=LONG):
        for tile in range(TILES):
            call("tdpbf16ps", [BYTE] * 3, [BYTE(tile), BYTE(4 + tile // 2), BYTE(6 + tile % 2)])
    call("tilestored64", [BYTE, pointer, LONG], [BYTE(0), operand, LONG(64)])
    call("tilerelease", [], [])


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


def tile_config() -> Any:
    """The 64 bytes LDTILECFG reads: palette 1, eight tiles of 16 rows x 64 bytes."""
    config = np.zeros(64, np.uint8)
    config[0] = 1
    config[16:32].view(np.uint16)[:] = 64
    config[48:56] = 16
    return config


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
