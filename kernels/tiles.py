"""Products of small float32 tiles in the caches: the micro-kernel of the CPU's matrix-like operations.

``multiply`` adds A B to C for six rows of C and any number of vectors. Its core is what every fast BLAS has
at its heart (Goto and van de Geijn 2008, "Anatomy of high-performance matrix multiplication", section 6): C
stays in registers, and each step of the depth loads one row of B (``VECTORS`` full vectors) and one number
of each of the six rows of A, broadcast. The vectors are written out in LLVM IR; LLVM's loop vectoriser
would keep C in memory. ``pack_transposed`` lays a matrix out so that its transpose is read in that order.

Operands are given by address (``kernels.compiled_once``), strides in elements. On 16 float32 lanes and 32
registers a tile is 6 x 64.
"""

from __future__ import annotations

import platform

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.compiled_once import compiled_once, floats_at
from kernels.simd import vector_lanes

LANES = max(4, vector_lanes(np.float32))
ROWS = 6
# 24 accumulators of 32 registers; x86 before AVX-512 has 16.
VECTORS = 4 if LANES == 16 or platform.machine() not in ("x86_64", "AMD64") else 2
PANEL = VECTORS * LANES
"""Columns of one tile."""
DEPTH = 64
"""Terms of a sum that are added one by one: sums of such sums err less, and a panel of B stays in L1."""

_LONG, _FLOAT = ir.IntType(64), ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)


def _vector_at(builder, place, elements):
    pointer = builder.gep(builder.inttoptr(place, _FLOAT.as_pointer()), [elements])
    return builder.bitcast(pointer, _VECTOR.as_pointer())


def _load(builder, pointer):
    value = builder.load(pointer)
    value.align = 4
    return value


def _splat(builder, number):
    first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), number, ir.IntType(32)(0))
    return builder.shuffle_vector(
        first,
        ir.Constant(_VECTOR, ir.Undefined),
        ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES),
    )


def _tile(vectors):
    """The micro-kernel of ``ROWS`` x ``vectors`` vectors, as an intrinsic."""

    @intrinsic
    def tile(typing, c, c_row, a, a_row, a_step, b, b_step, depth, fresh):
        def codegen(context, builder, signature, args):
            c, c_row, a, a_row, a_step, b, b_step, depth, fresh = args
            fused = f"llvm.fmuladd.v{LANES}f32"
            function = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), fused
            )
            places = [
                [
                    _vector_at(builder, c, builder.add(builder.mul(c_row, _LONG(row)), _LONG(LANES * vector)))
                    for vector in range(vectors)
                ]
                for row in range(ROWS)
            ]
            cells = [[cgutils.alloca_once(builder, _VECTOR) for _ in range(vectors)] for _ in range(ROWS)]
            zero = ir.Constant(_VECTOR, [0.0] * LANES)
            for row in range(ROWS):
                for vector in range(vectors):
                    builder.store(zero, cells[row][vector])
            left = builder.inttoptr(a, _FLOAT.as_pointer())
            rows = [builder.gep(left, [builder.mul(a_row, _LONG(row))]) for row in range(ROWS)]
            with cgutils.for_range(builder, depth, intp=_LONG) as loop:
                offset = builder.mul(loop.index, b_step)
                right = [
                    _load(builder, _vector_at(builder, b, builder.add(offset, _LONG(LANES * vector))))
                    for vector in range(vectors)
                ]
                step = builder.mul(loop.index, a_step)
                for row in range(ROWS):
                    factor = _splat(builder, builder.load(builder.gep(rows[row], [step])))
                    for vector in range(vectors):
                        cell = cells[row][vector]
                        builder.store(
                            builder.call(function, [factor, right[vector], builder.load(cell)]), cell
                        )
            with builder.if_then(builder.not_(fresh)):
                for row in range(ROWS):
                    for vector in range(vectors):
                        cell = cells[row][vector]
                        before = _load(builder, places[row][vector])
                        builder.store(builder.fadd(before, builder.load(cell)), cell)
            for row in range(ROWS):
                for vector in range(vectors):
                    store = builder.store(builder.load(cells[row][vector]), places[row][vector])
                    store.align = 4
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8, types.boolean), codegen

    return tile


_tile_1, _tile_2, _tile_3, _tile_4 = (_tile(vectors) for vectors in range(1, 5))


@compiled_once()
def multiply(c, c_row, a, a_row, a_step, b, b_step, b_panel, depth, vectors, fresh):
    """C[6, vectors * LANES] += A[6, depth] B[depth, vectors * LANES]; C = A B where ``fresh``.

    c, a, b: addresses of float32. c_row, a_row: from one row to the next; a_step: from one column of A to
    the next (A may be read transposed). b_step: from one row of B to the next; b_panel: from one panel of
    ``PANEL`` columns to the next. Terms are added up ``DEPTH`` at a time.
    """
    while vectors > 0:
        width = min(vectors, VECTORS)
        for step in range(0, max(1, depth), DEPTH):
            left, right = a + step * a_step * 4, b + step * b_step * 4
            part, first = min(DEPTH, depth - step), fresh != 0 and step == 0
            if width == 4:
                _tile_4(c, c_row, left, a_row, a_step, right, b_step, part, first)
            elif width == 3:
                _tile_3(c, c_row, left, a_row, a_step, right, b_step, part, first)
            elif width == 2:
                _tile_2(c, c_row, left, a_row, a_step, right, b_step, part, first)
            else:
                _tile_1(c, c_row, left, a_row, a_step, right, b_step, part, first)
        c += PANEL * 4
        b += b_panel * 4
        vectors -= VECTORS


@intrinsic
def _transpose(typing, target, target_row, source, source_row):
    """target[j, i] = source[i, j] of ``LANES`` x ``LANES`` float32, given by address.

    log2(LANES) rounds in which the first half of the rows is interleaved with the second.
    """

    def codegen(context, builder, signature, args):
        target, target_row, source, source_row = args
        rows = [
            _load(builder, _vector_at(builder, source, builder.mul(source_row, _LONG(row))))
            for row in range(LANES)
        ]
        word, half = ir.IntType(32), LANES // 2
        masks = [
            ir.Constant(
                ir.VectorType(word, LANES),
                [place for lane in range(half) for place in (first + lane, first + lane + LANES)],
            )
            for first in (0, half)
        ]
        for _ in range(LANES.bit_length() - 1):
            rows = [
                builder.shuffle_vector(rows[row], rows[row + half], mask)
                for row in range(half)
                for mask in masks
            ]
        for row, value in enumerate(rows):
            store = builder.store(value, _vector_at(builder, target, builder.mul(target_row, _LONG(row))))
            store.align = 4
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@compiled_once()
def pack_transposed(target, source, rows, columns):
    """The transpose of rows x columns contiguous float32, rows at most ``PANEL``: target[column, row].

    target, source: addresses; the target is columns x PANEL, what is missing of its rows becomes zeros.
    """
    numbers, packed = floats_at(source, rows * columns), floats_at(target, columns * PANEL)
    for row in range(0, PANEL, LANES):
        whole = columns - columns % LANES if row + LANES <= rows else 0
        for column in range(0, whole, LANES):
            _transpose(
                target + 4 * (column * PANEL + row), PANEL, source + 4 * (row * columns + column), columns
            )
        for column in range(whole, columns):
            for lane in range(row, row + LANES):
                packed[column * PANEL + lane] = (
                    numbers[lane * columns + column] if lane < rows else np.float32(0)
                )


@compiled_once()
def transpose_rows(target, source, source_row, columns):
    """The transpose of ``LANES`` rows of a multiple of ``LANES`` columns into a panel: target[column, row].

    source_row: elements from one row to the next.
    """
    for column in range(0, columns, LANES):
        _transpose(target + 4 * column * PANEL, PANEL, source + 4 * column, source_row)
