"""Factors of a product on AMX tiles: bfloat16, in the order in which the tiles are loaded, filled with zeros.

A block is what one step of the product takes of a factor: 32 rows of A, or 32 columns of B, of 32 consecutive
k. Of A: (panels, blocks, parts, 32 rows, 32 k). Of B, pairs of consecutive k side by side, as TDPBF16PS reads
them: (panels, blocks, 16 pairs, 64 = 32 columns x 2 k).

Numbers with more bits than a bfloat16 go in as a sum of parts, each the upper eight bits of what the parts
before it leave: three hold a float32 exactly, two a float16. Times weights that are exact in bfloat16 they
give the product of the full numbers. (Parts below 2**-126 count as zero, as the instruction has it.)

Sources: Intel 64 and IA-32 Optimization Reference Manual, chapter on AMX (the pair-interleaved layout of B);
Henry, Tang and Heinecke 2019, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision
computations" (the split).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kernels.ir_vectors import (
    BYTE,
    FLOAT,
    LONG,
    SHORT,
    WORD,
    bfloat16_bits,
    declare,
    load,
    pointer_at,
    shuffle,
    splat,
    store,
)
from kernels.threads import chunked

SIDE = 32
"""Rows, columns and k of a block."""
BLOCK = SIDE * SIDE
"""Numbers in a block."""
PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
"""How many bfloat16 numbers hold one of these exactly."""

_PANELS_AT_ONCE = 8  # of B where columns are contiguous: 512 bytes of each row
_BLOCKS_AT_ONCE = 8
_SHORTS, _HALF_SHORTS = ir.VectorType(SHORT, SIDE), ir.VectorType(SHORT, SIDE // 2)
_BYTES, _WORDS, _FLOATS = (ir.VectorType(kind, 16) for kind in (BYTE, WORD, FLOAT))


def _all(vector: Any, number: int) -> Any:
    return ir.Constant(vector, [number] * vector.count)


# --- 32 numbers of a source as bfloat16 ----------------------------------------------------------


def _upper(builder: Any, low: Any, high: Any) -> Any:
    """The upper halves of two vectors of words, as one vector."""
    halves = [builder.trunc(builder.lshr(bits, _all(_WORDS, 16)), _HALF_SHORTS) for bits in (low, high)]
    return shuffle(builder, halves[0], halves[1], range(SIDE))


def _from_int8(builder: Any, pointer: Any) -> Any:
    words = []
    for half in range(2):
        place = builder.gep(pointer, [LONG(16 * half)])
        integers = builder.sext(load(builder, place, _BYTES, 1), _WORDS)
        words.append(builder.bitcast(builder.sitofp(integers, _FLOATS), _WORDS))
    return _upper(builder, *words)


def _from_int4(builder: Any, pointers: list[Any], shifts: list[Any]) -> Any:
    """Twice 16 nibbles, the lower or (shift 4) the upper ones of 16 bytes."""
    halves = []
    for pointer, shift in zip(pointers, shifts, strict=True):
        packed = builder.zext(load(builder, pointer, _BYTES, 1), _HALF_SHORTS)
        halves.append(builder.lshr(packed, splat(builder, shift, 16)))
    index = shuffle(builder, halves[0], halves[1], range(SIDE))
    numbers = ir.Constant(_SHORTS, [bfloat16_bits(float(i % 16 - 8)) for i in range(SIDE)])
    lookup = declare(builder, "llvm.x86.avx512.permvar.hi.512", _SHORTS, [_SHORTS, _SHORTS])
    return builder.call(lookup, [numbers, index])


# --- blocks --------------------------------------------------------------------------------------


@intrinsic
def _copy(typing: Any, source: Any, start: Any, target: Any, place: Any) -> Any:
    """target[place:place+32] = source[start:start+32], bfloat16."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = load(builder, pointer_at(context, builder, signature, args, 0, args[1]), _SHORTS, 2)
        store(builder, value, pointer_at(context, builder, signature, args, 2, args[3]), 2)
        return context.get_dummy_value()

    return types.void(source, start, target, place), codegen


@cache
def _split(parts: int) -> Any:
    """Intrinsic (source, start, target, place): 32 float32 as so many parts, ``BLOCK`` apart.

    What is not finite is its first part; the others are zero.
    """

    @intrinsic
    def split(typing: Any, source: Any, start: Any, target: Any, place: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = pointer_at(context, builder, signature, args, 0, args[1])
            rests = [load(builder, builder.gep(pointer, [LONG(16 * half)]), _FLOATS, 4) for half in range(2)]
            zero = ir.Constant(_FLOATS, [0.0] * 16)
            for part in range(parts):
                words = []
                for half, rest in enumerate(rests):
                    bits = builder.bitcast(rest, _WORDS)
                    if part == 0:  # a NaN whose upper bits alone would be an infinity stays one
                        quiet = builder.or_(bits, _all(_WORDS, 0x00400000))
                        bits = builder.select(builder.fcmp_unordered("uno", rest, rest), quiet, bits)
                    bits = builder.and_(bits, _all(_WORDS, -65536))
                    words.append(bits)
                    rest = builder.fsub(rest, builder.bitcast(bits, _FLOATS))
                    if part == 0:
                        rest = builder.select(builder.fcmp_ordered("ord", rest, rest), rest, zero)
                    rests[half] = rest
                offset = builder.add(args[3], LONG(BLOCK * part))
                there = pointer_at(context, builder, signature, args, 2, offset)
                store(builder, _upper(builder, *words), there, 2)
            return context.get_dummy_value()

        return types.void(source, start, target, place), codegen

    return split


@intrinsic
def _interleave(typing: Any, source: Any, first: Any, second: Any, target: Any, place: Any) -> Any:
    """32 columns of two rows of bfloat16, in pairs: source[first + j] and source[second + j] side by side."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows = [
            load(builder, pointer_at(context, builder, signature, args, 0, args[i]), _SHORTS, 2)
            for i in (1, 2)
        ]
        for half in range(2):
            lanes = [lane for j in range(16 * half, 16 * half + 16) for lane in (j, SIDE + j)]
            offset = builder.add(args[4], LONG(SIDE * half))
            pairs = shuffle(builder, rows[0], rows[1], lanes)
            store(builder, pairs, pointer_at(context, builder, signature, args, 3, offset), 2)
        return context.get_dummy_value()

    return types.void(source, first, second, target, place), codegen


@cache
def _turn(bits: int) -> Any:
    """Intrinsic (source, start, stride, second, shift, second_shift, target, place): 16 lines of 32 k, turned
    into 16 pairs of k of 16 columns.

    Line i starts at source[start + i * stride]. Of int4 weights 16 k start there and 16 more ``second`` bytes
    further, in the nibbles that the shifts say; otherwise these are not used. Four rounds that interleave the
    first half of the lines with the second.
    """

    @intrinsic
    def turn(
        typing: Any, source: Any, start: Any, stride: Any, second: Any, shift: Any, second_shift: Any,
        target: Any, place: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            shifts = [builder.trunc(args[i], SHORT) for i in (4, 5)]
            lines = []
            for i in range(16):
                offset = builder.add(args[1], builder.mul(args[2], LONG(i)))
                pointer = pointer_at(context, builder, signature, args, 0, offset)
                if bits == 16:
                    line = load(builder, pointer, _SHORTS, 2)
                elif bits == 8:
                    line = _from_int8(builder, pointer)
                else:
                    line = _from_int4(builder, [pointer, builder.gep(pointer, [args[3]])], shifts)
                lines.append(builder.bitcast(line, _WORDS))
            masks = [[lane for j in range(first, first + 8) for lane in (j, j + 16)] for first in (0, 8)]
            for _ in range(4):
                lines = [shuffle(builder, lines[i], lines[i + 8], mask) for i in range(8) for mask in masks]
            for pair, line in enumerate(lines):
                offset = builder.add(args[7], LONG(2 * SIDE * pair))
                store(builder, line, pointer_at(context, builder, signature, args, 6, offset), 2)
            return context.get_dummy_value()

        kinds = (source, start, stride, second, shift, second_shift, target, place)
        return types.void(*kinds), codegen

    return turn


# --- the bodies ----------------------------------------------------------------------------------


@cache
def pack_rows(parts: int) -> Any:
    """A body for A (rows, k): bfloat16 where parts is 1, else float32; a chunk is a panel of ``out``."""
    move = _copy if parts == 1 else _split(parts)

    @chunked
    def rows_body(chunk, source, out):
        rows, depth = source.shape
        blocks = out.shape[1]
        target, numbers = out[chunk].reshape(-1), source.reshape(source.size)
        whole = depth // SIDE
        rest = np.zeros(SIDE, source.dtype)
        for i in range(SIDE):
            row = chunk * SIDE + i
            if row >= rows:
                rest[:] = 0
                for block in range(blocks):
                    move(rest, 0, target, block * parts * BLOCK + i * SIDE)
                continue
            for block in range(whole):
                move(numbers, row * depth + block * SIDE, target, block * parts * BLOCK + i * SIDE)
            if whole < blocks:
                for j in range(depth - whole * SIDE):
                    rest[j] = source[row, whole * SIDE + j]
                move(rest, 0, target, whole * parts * BLOCK + i * SIDE)

    return rows_body


@chunked
def _columns_body(chunk, across, source, first, out):
    """B (k, columns) of bfloat16 from column ``first`` on; a chunk is some panels of some blocks."""
    depth, columns = source.shape
    panels, blocks = out.shape[0], out.shape[1]
    low_panel = chunk % across * _PANELS_AT_ONCE
    high_panel = min(low_panel + _PANELS_AT_ONCE, panels)
    low_block = chunk // across * _BLOCKS_AT_ONCE
    high_block = min(low_block + _BLOCKS_AT_ONCE, blocks)
    numbers, target = source.reshape(source.size), out.reshape(out.size)
    edge = np.zeros(2 * SIDE, source.dtype)
    for pair in range(low_block * (SIDE // 2), high_block * (SIDE // 2)):
        row = 2 * pair
        for panel in range(low_panel, high_panel):
            place = panel * blocks * BLOCK + pair * 2 * SIDE
            column = first + panel * SIDE
            if row + 1 < depth and column + SIDE <= columns:
                start = row * columns + column
                _interleave(numbers, start, start + columns, target, place)
            else:
                edge[:] = 0
                for k in range(min(2, depth - row)):
                    for j in range(min(SIDE, columns - column)):
                        edge[k * SIDE + j] = source[row + k, column + j]
                _interleave(edge, 0, SIDE, target, place)


def pack_columns(source: torch.Tensor, first: int, out: torch.Tensor) -> None:
    """B (k, columns) of bfloat16, contiguous, from column ``first`` on into the panels of ``out``."""
    across = -(-len(out) // _PANELS_AT_ONCE)
    _columns_body(across * -(-out.shape[1] // _BLOCKS_AT_ONCE), across, source, first, out)


@cache
def pack_lines(bits: int) -> Any:
    """A body for B given transposed: (columns, k) of bfloat16 (bits 16) or int8, or (columns, k / 2) bytes of
    int4 in groups of ``group`` as ``quantize_int4`` packs them, from line ``first`` on; a chunk is a panel.
    """
    turn = _turn(bits)

    @chunked
    def lines_body(chunk, source, first, group, out):
        lines, length = source.shape
        blocks = out.shape[1]
        numbers, target = source.reshape(source.size), out[chunk].reshape(-1)
        half = max(1, group // 2)
        whole = length * (2 if bits == 4 else 1) // SIDE
        edge = np.zeros(16 * SIDE, source.dtype)
        for block in range(blocks):
            start, second, shift, second_shift = block * SIDE, 0, 0, 0
            if bits == 4:  # k -> its byte, twice for 16 k that lie in one half of a group
                k = start
                shift = 4 if k % group >= half else 0
                start = k // group * half + k % half
                k += 16
                second_shift = 4 if k % group >= half else 0
                second = k // group * half + k % half - start
            for part in range(2):
                low = first + chunk * SIDE + part * 16
                place = block * BLOCK + part * SIDE
                if low + 16 <= lines and block < whole:
                    turn(numbers, low * length + start, length, second, shift, second_shift, target, place)
                    continue
                # Copied to where there is room for all of a block; beyond the source there are zeros.
                if bits == 4:
                    for i in range(16):
                        for j in range(16):
                            edge[i * SIDE + j] = edge[i * SIDE + 16 + j] = 0x88  # twice q = 0
                            if low + i < lines:
                                edge[i * SIDE + j] = source[low + i, start + j]
                                edge[i * SIDE + 16 + j] = source[low + i, start + second + j]
                    turn(edge, 0, SIDE, 16, shift, second_shift, target, place)
                else:
                    for i in range(16):
                        for j in range(SIDE):
                            inside = low + i < lines and start + j < length
                            edge[i * SIDE + j] = source[low + i, start + j] if inside else 0
                    turn(edge, 0, SIDE, 0, 0, 0, target, place)

    return lines_body
