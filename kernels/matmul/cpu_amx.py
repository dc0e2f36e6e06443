"""Products on AMX tiles: bfloat16 by bfloat16, and numbers in parts by quantised weights.

Two by two tiles hold 32 x 32 sums while a step takes two tiles of each factor, so that each load serves two
multiplications. Some k of a panel of B stay in the first-level cache while the panels of A go by from the
second; sums of a deeper product wait there too. ``cpu_amx_pack`` lays the factors out; B is packed by strips
of four second-level caches, each used for all rows of A.

Sources: Goto and van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication" (blocks and panels);
Intel 64 and IA-32 Optimization Reference Manual, chapter on AMX (two by two tiles).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.amx import amx_unavailable, emit, tile_config
from kernels.caches import second_level_bytes
from kernels.ir_vectors import BYTE, FLOAT, LONG, BFloat, address, declare, load, pointer_at, prefetch, store
from kernels.matmul.cpu_amx_pack import BLOCK, PARTS, SIDE, pack_columns, pack_lines, pack_rows
from kernels.simd import compiled_features, full_width
from kernels.storage import narrow
from kernels.threads import chunked

FEATURES = {"amx-tile", "amx-bf16", "avx512f", "avx512bw", "avx512bf16"}
_DEPTHS = {1: 8, 2: 16, 3: 16}
"""Blocks of k at once, by parts: 16 KiB of a panel of B, as much of A that passes before it is read again,
and as much that comes next fill the 48 KiB of first-level cache which every CPU with AMX has. Of numbers in
parts more of A goes by in any case; B is read less often, and sums are scaled and added after each depth."""
_LINES = 2
_CHUNKS_OF_A_THREAD = 2
"""At least, if possible, of each strip."""
_TILES = tile_config()
_FLOATS = ir.VectorType(FLOAT, 16)


@cache
def usable() -> bool:
    """Whether this CPU has the tiles, numba compiles for them and this process may use them."""
    return compiled_features() >= FEATURES and not amx_unavailable()


# --- instructions --------------------------------------------------------------------------------


@intrinsic
def _configure(typing: Any, tiles: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = address(context, builder, signature.args[0], args[0])
        emit(builder, "ldtilecfg", [BYTE.as_pointer()], [builder.bitcast(data, BYTE.as_pointer())])
        return context.get_dummy_value()

    return types.void(tiles), codegen


@intrinsic
def _release(typing: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit(builder, "tilerelease", [], [])
        return context.get_dummy_value()

    return types.void(), codegen


@cache
def _multiply(parts: int) -> Any:
    """Intrinsic (a, a_start, b, b_start, blocks, fresh, sums, place, ahead): 32 x 32 float32 sums += a @ b
    over ``blocks`` blocks of both; = a @ b where ``fresh``.

    sums: row by row from ``place`` on. Tiles 0 to 3 hold them, 4 and 5 the halves of A, 6 and 7 those of B.
    Meanwhile b[ahead:] is asked for, ``_LINES`` cache lines a block.
    """

    @intrinsic
    def multiply(
        typing: Any,
        a: Any,
        a_start: Any,
        b: Any,
        b_start: Any,
        blocks: Any,
        fresh: Any,
        sums: Any,
        place: Any,
        ahead: Any,
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = BYTE.as_pointer()

            def move(name: str, tile: int, base: Any, offset: int, stride_bytes: int) -> None:
                start = builder.bitcast(builder.gep(base, [LONG(offset)]), pointer)
                kinds = [BYTE, pointer, LONG]
                emit(builder, name, kinds, [BYTE(tile), start, LONG(stride_bytes)])

            def product(tile: int) -> None:
                operands = [BYTE(tile), BYTE(4 + tile // 2), BYTE(6 + tile % 2)]
                emit(builder, "tdpbf16ps", [BYTE] * 3, operands)

            left = pointer_at(context, builder, signature, args, 0, args[1])
            right = pointer_at(context, builder, signature, args, 2, args[3])
            total = pointer_at(context, builder, signature, args, 6, args[7])
            later = pointer_at(context, builder, signature, args, 2, args[8])
            quarters = [16 * SIDE * (tile // 2) + 16 * (tile % 2) for tile in range(4)]
            is_fresh = builder.icmp_signed("!=", args[5], args[5].type(0))
            with builder.if_else(is_fresh) as (then, otherwise):
                with then:
                    for tile in range(4):
                        emit(builder, "tilezero", [BYTE], [BYTE(tile)])
                with otherwise:
                    for tile, quarter in enumerate(quarters):
                        move("tileloadd64", tile, total, quarter, 4 * SIDE)
            with cgutils.for_range(builder, args[4], intp=LONG) as loop:
                above = builder.gep(left, [builder.mul(loop.index, LONG(parts * BLOCK))])
                beside = builder.gep(right, [builder.mul(loop.index, LONG(BLOCK))])
                for line in range(_LINES):
                    offset = builder.add(builder.mul(loop.index, LONG(32 * _LINES)), LONG(32 * line))
                    prefetch(builder, builder.gep(later, [offset]))
                for part in range(parts):
                    # A tile is loaded just before it is needed first.
                    if part == 0:
                        move("tileloadd64", 6, beside, 0, 4 * SIDE)
                    move("tileloadd64", 4, above, part * BLOCK, 2 * SIDE)
                    product(0)
                    if part == 0:
                        move("tileloadd64", 7, beside, SIDE, 4 * SIDE)
                    product(1)
                    move("tileloadd64", 5, above, part * BLOCK + BLOCK // 2, 2 * SIDE)
                    product(2)
                    product(3)
            for tile, quarter in enumerate(quarters):
                move("tilestored64", tile, total, quarter, 4 * SIDE)
            return context.get_dummy_value()

        kinds = (a, a_start, b, b_start, blocks, fresh, sums, place, ahead)
        return types.void(*kinds), codegen

    return multiply


@intrinsic
def _scaled_add(typing: Any, sums: Any, place: Any, start: Any, scale: Any, column: Any) -> Any:
    """sums[place:] += sums[start:] * scale[column:column+32], 32 x 32, a factor for each column."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        total = pointer_at(context, builder, signature, args, 0, args[1])
        source = pointer_at(context, builder, signature, args, 0, args[2])
        scales = pointer_at(context, builder, signature, args, 3, args[4])
        factors = [load(builder, builder.gep(scales, [LONG(16 * half)]), _FLOATS, 4) for half in range(2)]
        with cgutils.for_range(builder, LONG(SIDE), intp=LONG) as loop:
            for half, factor in enumerate(factors):
                offset = builder.add(builder.mul(loop.index, LONG(SIDE)), LONG(16 * half))
                target = builder.gep(total, [offset])
                value = load(builder, builder.gep(source, [offset]), _FLOATS, 4)
                product = builder.fmul(value, factor, flags=["contract"])
                result = builder.fadd(load(builder, target, _FLOATS, 4), product, flags=["contract"])
                store(builder, result, target, 4)
        return context.get_dummy_value()

    return types.void(sums, place, start, scale, column), codegen


@intrinsic
def _finish(
    typing: Any, sums: Any, place: Any, scale: Any, bias: Any, column: Any, out: Any, start: Any
) -> Any:
    """out[start + j] = sums[place + j] * scale[column + j] + bias[column + j], j < 32; bfloat16 (to nearest
    even, denormals to zero) or float32. scale and bias None: the sums as they are.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element = signature.args[5].dtype
        values = []
        for half in range(2):
            at = [builder.add(args[index], LONG(16 * half)) for index in (1, 4)]
            value = load(builder, pointer_at(context, builder, signature, args, 0, at[0]), _FLOATS, 4)
            if signature.args[2] is not types.none:
                factor, shift = (
                    load(builder, pointer_at(context, builder, signature, args, index, at[1]), _FLOATS, 4)
                    for index in (2, 3)
                )
                value = builder.fmul(value, factor, flags=["contract"])
                value = builder.fadd(value, shift, flags=["contract"])
            values.append(value)
        if element is types.uint16:
            pairs = ir.VectorType(BFloat(), SIDE)
            both = declare(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", pairs, [_FLOATS, _FLOATS])
            values = [builder.call(both, [values[1], values[0]])]
        for part, value in enumerate(values):
            target = pointer_at(context, builder, signature, args, 5, builder.add(args[6], LONG(16 * part)))
            store(builder, value, target, element.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(sums, place, scale, bias, column, out, start), codegen


# --- the product ---------------------------------------------------------------------------------


@cache
def _product(parts: int) -> Any:
    """A body for a block of the output: ``tall`` panels of rows and ``wide`` panels of columns. Blocks are
    numbered along rows (``by_rows``) or down columns.

    out[:, first:] = (a @ b) * scale + bias, (n,) both; None: as it is. group_scale: (groups, n filled up to
    whole panels), each for ``group`` blocks of k; or None.
    """
    multiply, depth = _multiply(parts), _DEPTHS[parts]

    @chunked
    def product(chunk, by_rows, tall, wide, first, a, b, group_scale, group, scale, bias, out):
        full_width()
        m, n = out.shape
        blocks = b.shape[1]
        down, across = -(-a.shape[0] // tall), -(-b.shape[0] // wide)
        low_row = (chunk // across if by_rows else chunk % down) * tall
        rows = min(tall, a.shape[0] - low_row)
        low_column = (chunk % across if by_rows else chunk // down) * wide
        columns = min(wide, b.shape[0] - low_column)
        memory = np.empty((1 + rows * columns) * BLOCK + 16, np.float32)
        of_group = -np.int64(memory.ctypes.data) % 64 // 4  # on a cache line, which is a row of a tile
        left, right, target = a.reshape(a.size), b.reshape(b.size), out.reshape(out.size)
        _configure(_TILES)
        for low in range(0, max(1, blocks), depth):
            high = min(low + depth, blocks)
            for q in range(columns):
                b_start = (low_column + q) * blocks * BLOCK
                following = b_start + (blocks + low) * BLOCK
                if q == columns - 1:
                    following = (low_column * blocks + high) * BLOCK
                for p in range(rows):
                    a_start = (low_row + p) * blocks * parts * BLOCK
                    sums = of_group + (1 + p * columns + q) * BLOCK
                    ahead = following + p * (high - low) * 32 * _LINES
                    if group_scale is None:
                        multiply(
                            left, a_start + low * parts * BLOCK, right, b_start + low * BLOCK,
                            high - low, low == 0, memory, sums, ahead,
                        )  # fmt: skip
                        continue
                    if low == 0:
                        memory[sums : sums + BLOCK] = np.float32(0)
                    block = low
                    while block < high:
                        stop = min(high, (block // group + 1) * group)
                        multiply(
                            left, a_start + block * parts * BLOCK, right, b_start + block * BLOCK,
                            stop - block, True, memory, of_group, ahead + (block - low) * 32 * _LINES,
                        )  # fmt: skip
                        column = first + (low_column + q) * SIDE
                        _scaled_add(memory, sums, of_group, group_scale[block // group], column)
                        block = stop
        _release()
        # By rows: each lies in a page of its own, which costs more to find than its columns to write.
        for p in range(rows):
            for i in range(min(SIDE, m - (low_row + p) * SIDE)):
                start = ((low_row + p) * SIDE + i) * n
                for q in range(columns):
                    sums = of_group + (1 + p * columns + q) * BLOCK + i * SIDE
                    column = first + (low_column + q) * SIDE
                    if column + SIDE <= n:
                        _finish(memory, sums, scale, bias, column, target, start + column)
                        continue
                    for j in range(n - column):
                        value = memory[sums + j]
                        if scale is not None:
                            value = value * scale[column + j] + bias[column + j]
                        target[start + column + j] = narrow(value, out)

    return product


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    bits: int = 16,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """out = (a @ b) * scale + bias; contiguous matrices.

    a: (m, k), or (k, m) where transpose_a; bfloat16, or float32 or float16, which are multiplied in full. b:
    (k, n) or, where transpose_b, (n, k), bfloat16; or with ``bits`` 8 or 4, transposed, int8 or packed int4
    weights. scale: (n, groups of k) float32; bias: (n,) float32, with a scale only; either may be None. out:
    (m, n) bfloat16 or float32.
    """
    m, n = out.shape
    if not m or not n:
        return out
    if transpose_a:
        a = a.t().contiguous()
    parts = PARTS[a.dtype]
    blocks, panels, columns = (-(-size // SIDE) for size in (a.shape[1], m, n))
    left = torch.empty((panels, blocks, parts * BLOCK), dtype=torch.bfloat16)
    pack_rows(parts)(panels, a if parts == 1 else a.float(), left)
    group, group_scale, column_scale = max(1, blocks), None, None
    if scale is not None:
        groups = scale.shape[1]  # none where k is 0
        column_scale = scale.reshape(n) if groups == 1 else torch.ones(n, dtype=torch.float32)
        if groups > 1:
            group, group_scale = blocks // groups, torch.zeros((groups, columns * SIDE), dtype=torch.float32)
            group_scale[:, :n] = scale.t()
        bias = torch.zeros(n, dtype=torch.float32) if bias is None else bias
    packed_group = group * SIDE
    if parts > 1 and group_scale is None and blocks > _DEPTHS[parts]:
        # Sums of sums, which err less than one long sum.
        group = _DEPTHS[parts]
        group_scale = torch.ones((-(-blocks // group), columns * SIDE), dtype=torch.float32)
    strip = min(columns, max(1, 4 * second_level_bytes() // (2 * BLOCK * max(1, blocks))))
    tall, wide = _chunk_sizes(panels, strip, parts, torch.get_num_threads())
    # A thread packs neighbouring panels and computes neighbouring blocks: those of the rows of A that it has
    # packed, if it finds them in its cache, or of the columns of B.
    by_rows = 2 * left.numel() <= torch.get_num_threads() * second_level_bytes()
    right = torch.empty((strip, blocks, BLOCK), dtype=torch.bfloat16)
    for first in range(0, columns, strip):
        part = right[: min(strip, columns - first)]
        if transpose_b:
            pack_lines(bits)(len(part), b, first * SIDE, packed_group, part)
        else:
            pack_columns(b, first * SIDE, part)
        chunks = -(-panels // tall) * -(-len(part) // wide)
        _product(parts)(
            chunks, by_rows, tall, wide, first * SIDE, left, part, group_scale, group, column_scale, bias, out
        )
    return out


def _chunk_sizes(panels: int, across: int, parts: int, threads: int) -> tuple[int, int]:
    """Panels of rows and of columns in a chunk of a strip ``across`` panels wide. No sum depends on them.

    Its sums take a quarter of the second-level cache. They are twice as tall as wide, since B comes from
    beyond that cache and serves all rows; but a depth of those rows of A stays there as well, and every
    thread has ``_CHUNKS_OF_A_THREAD`` chunks if possible.
    """
    size = second_level_bytes()
    sums = size // 4 // (4 * BLOCK)
    most = max(1, min(math.isqrt(2 * sums), size * 3 // 8 // (2 * BLOCK * parts * _DEPTHS[parts])))
    least = _CHUNKS_OF_A_THREAD * threads
    down = max(-(-panels // most), min(panels, -(-least // across)))
    tall = -(-panels // down)
    return tall, max(1, min(sums // tall, across * -(-panels // tall) // least))
