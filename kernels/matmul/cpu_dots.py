"""Inner products of quantised weight rows with a few rows of activations, in registers.

For few activations a product is a stream of weights: each is read once, widened in registers and multiplied
with 1 or 4 rows of float32 activations, for 4 weight rows at a time, so that a load of activations serves
four multiplications. While four rows are read, the next four are fetched: a row is often just a page, where
the hardware's own prefetching stops.

int4 weights are looked up: a nibble selects one of the 16 multiples of its group's scale (VPERMPS), which
costs one instruction where masking, converting and scaling cost four.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.ir_vectors import (
    BYTE,
    FLOAT,
    LONG,
    SHORT,
    WORD,
    BFloat,
    address,
    bfloat16_bits,
    declare,
    load,
    prefetch,
    splat,
)
from kernels.simd import compiled_features

LANES = 16
WEIGHT_ROWS = 4  # of one tile
_BYTES, _WORDS, _FLOATS = (ir.VectorType(kind, LANES) for kind in (BYTE, WORD, FLOAT))
_LOOKUP = "avx512f" in compiled_features()
_LINE = 64


def _constant(numbers: list[float]) -> Any:
    return ir.Constant(_FLOATS, numbers)


def _fma(builder: Any, left: Any, right: Any, total: Any) -> Any:
    product = builder.fmul(left, right, flags=["contract"])
    return builder.fadd(product, total, flags=["contract"])


class _Rows:
    """Pointers to some rows of a matrix from ``first`` on; beyond the last row, to the last."""

    def __init__(self, context: Any, builder: Any, kind: Any, array: Any, first: Any, count: int):
        struct = context.make_array(kind)(context, builder, array)
        rows, columns = cgutils.unpack_tuple(builder, struct.shape, 2)
        last = builder.sub(rows, LONG(1))
        self.pointers = []
        for i in range(count):
            row = builder.add(first, LONG(i))
            row = builder.select(builder.icmp_signed("<", row, last), row, last)
            self.pointers.append(builder.gep(struct.data, [builder.mul(row, columns)]))
        self.columns = columns


def _finish(context: Any, builder: Any, signature: Any, args: Any, index: int, cells: list[Any]) -> None:
    """The sum of each cell's lanes into the output array."""
    reduce = declare(builder, "llvm.vector.reduce.fadd.v16f32", FLOAT, [FLOAT, _FLOATS])
    out = address(context, builder, signature.args[index], args[index])
    for i, cell in enumerate(cells):
        total = builder.call(reduce, [FLOAT(-0.0), builder.load(cell)], fastmath=("reassoc",))
        builder.store(total, builder.gep(out, [LONG(i)]))


def _cells(builder: Any, count: int) -> list[Any]:
    return [cgutils.alloca_once_value(builder, _constant([0.0] * LANES)) for _ in range(count)]


@cache
def dots_int8(x_rows: int) -> Any:
    """Intrinsic (x, first_x, weight, first_weight, out): inner products over the columns in full vectors.

    x: (m, k) float32; weight: (n, k) int8; out: x_rows * WEIGHT_ROWS float32, x's row first. The last k mod
    16 columns are left to the caller.
    """

    @intrinsic
    def dots(typing: Any, x: Any, first_x: Any, weight: Any, first_weight: Any, out: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            left = _Rows(context, builder, signature.args[0], args[0], args[1], x_rows)
            right = _Rows(context, builder, signature.args[2], args[2], args[3], WEIGHT_ROWS)
            later = builder.mul(right.columns, LONG(WEIGHT_ROWS))
            cells = _cells(builder, x_rows * WEIGHT_ROWS)

            def step(position: Any) -> None:
                numbers = [load(builder, builder.gep(row, [position]), _FLOATS, 4) for row in left.pointers]
                for j, row in enumerate(right.pointers):
                    integers = builder.sext(load(builder, builder.gep(row, [position]), _BYTES, 1), _WORDS)
                    value = builder.sitofp(integers, _FLOATS)
                    for i, number in enumerate(numbers):
                        cell = cells[i * WEIGHT_ROWS + j]
                        builder.store(_fma(builder, number, value, builder.load(cell)), cell)

            whole = builder.and_(right.columns, LONG(-_LINE))
            with cgutils.for_range_slice(builder, LONG(0), whole, LONG(_LINE), LONG, inc=True) as (place, _):
                for row in right.pointers:
                    prefetch(builder, builder.gep(row, [builder.add(place, later)]))
                for part in range(0, _LINE, LANES):
                    step(builder.add(place, LONG(part)))
            full = builder.and_(right.columns, LONG(-LANES))
            with cgutils.for_range_slice(builder, whole, full, LONG(LANES), LONG, inc=True) as (place, _):
                step(place)
            _finish(context, builder, signature, args, 4, cells)
            return context.get_dummy_value()

        return types.void(x, first_x, weight, first_weight, out), codegen

    return dots


@cache
def dots_int4(x_rows: int) -> Any:
    """Intrinsic (x, first_x, weight, first_weight, scale, group, out): the same of int4 weights, all columns.

    weight: (n, k / 2), as ``quantize_int4`` packs it: in each group, the lower nibbles are its first half.
    scale: (n, k / group) float32. group: a multiple of 32.
    """

    @intrinsic
    def dots(
        typing: Any, x: Any, first_x: Any, weight: Any, first_weight: Any, scale: Any, group: Any, out: Any
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            left = _Rows(context, builder, signature.args[0], args[0], args[1], x_rows)
            right = _Rows(context, builder, signature.args[2], args[2], args[3], WEIGHT_ROWS)
            factors = _Rows(context, builder, signature.args[4], args[4], args[3], WEIGHT_ROWS)
            later = builder.mul(right.columns, LONG(WEIGHT_ROWS))
            half = builder.lshr(args[5], LONG(1))
            cells = _cells(builder, x_rows * WEIGHT_ROWS)
            multiples = _constant([float(q - 8) for q in range(16)])

            def weights(index: Any, factor: Any) -> Any:
                if _LOOKUP:
                    name = "llvm.x86.avx512.permvar.sf.512"
                    return builder.call(declare(builder, name, _FLOATS, [_FLOATS, _WORDS]), [factor, index])
                nibble = builder.and_(index, ir.Constant(_WORDS, [15] * LANES))
                number = builder.sitofp(builder.sub(nibble, ir.Constant(_WORDS, [8] * LANES)), _FLOATS)
                return builder.fmul(number, factor)

            def step(bytes_place: Any, place: Any, tables: list[Any]) -> None:
                numbers = []
                for row in left.pointers:
                    pointer = builder.gep(row, [place])
                    upper = builder.gep(pointer, [half])
                    numbers.append((load(builder, pointer, _FLOATS, 4), load(builder, upper, _FLOATS, 4)))
                for j, row in enumerate(right.pointers):
                    index = builder.zext(load(builder, builder.gep(row, [bytes_place]), _BYTES, 1), _WORDS)
                    upper = builder.lshr(index, ir.Constant(_WORDS, [4] * LANES))
                    values = weights(index, tables[j]), weights(upper, tables[j])
                    for i, pair in enumerate(numbers):
                        cell = cells[i * WEIGHT_ROWS + j]
                        total = builder.load(cell)
                        for number, value in zip(pair, values, strict=True):
                            total = _fma(builder, number, value, total)
                        builder.store(total, cell)

            with cgutils.for_range(builder, factors.columns, intp=LONG) as groups:
                tables = []
                start = builder.mul(groups.index, half)
                column = builder.mul(groups.index, args[5])
                for row, bytes_row in zip(factors.pointers, right.pointers, strict=True):
                    factor = splat(builder, builder.load(builder.gep(row, [groups.index])), LANES)
                    tables.append(builder.fmul(multiples, factor) if _LOOKUP else factor)
                    prefetch(builder, builder.gep(bytes_row, [builder.add(start, later)]))
                with cgutils.for_range_slice(builder, LONG(0), half, LONG(LANES), LONG, inc=True) as (
                    within,
                    _,
                ):
                    step(builder.add(start, within), builder.add(column, within), tables)
            _finish(context, builder, signature, args, 6, cells)
            return context.get_dummy_value()

        return types.void(x, first_x, weight, first_weight, scale, group, out), codegen

    return dots


PAIRS = {"avx512f", "avx512bw", "avx512bf16"} <= compiled_features()
"""Whether ``dots_int4_pairs`` exists here."""


@intrinsic
def dots_int4_pairs(
    typing: Any, x: Any, weight: Any, first_weight: Any, scale: Any, group: Any, out: Any
) -> Any:
    """``dots_int4`` of one row of bfloat16 activations: twice the weights in each instruction (VPERMW,
    VDPBF16PS).

    64 bytes of weights are 32 16-bit words of four nibbles; nibble i of every word is looked up at once, as
    exact bfloat16 integers, against 32 activations. x: (1, k), arranged by ``arranged_for_pairs``. The scale
    multiplies each group's sum. group: a multiple of 128.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        words, pairs = ir.VectorType(SHORT, 32), ir.VectorType(BFloat(), 32)
        lookup = declare(builder, "llvm.x86.avx512.permvar.hi.512", words, [words, words])
        dot = declare(builder, "llvm.x86.avx512bf16.dpbf16ps.512", _FLOATS, [_FLOATS, pairs, pairs])
        multiples = ir.Constant(words, [bfloat16_bits(float(i % 16 - 8)) for i in range(32)])
        left = _Rows(context, builder, signature.args[0], args[0], LONG(0), 1).pointers[0]
        right = _Rows(context, builder, signature.args[1], args[1], args[2], WEIGHT_ROWS)
        factors = _Rows(context, builder, signature.args[3], args[3], args[2], WEIGHT_ROWS)
        later = builder.mul(right.columns, LONG(WEIGHT_ROWS))
        half = builder.lshr(args[4], LONG(1))
        cells = _cells(builder, WEIGHT_ROWS)
        with cgutils.for_range(builder, factors.columns, intp=LONG) as groups:
            parts = _cells(builder, WEIGHT_ROWS)
            for part in parts:
                builder.store(_constant([0.0] * LANES), part)
            start = builder.mul(groups.index, half)
            with cgutils.for_range_slice(builder, LONG(0), half, LONG(_LINE), LONG, inc=True) as (within, _):
                place = builder.add(start, within)
                activations = []
                for i in range(4):
                    pointer = builder.gep(left, [builder.add(builder.shl(place, LONG(1)), LONG(32 * i))])
                    activations.append(builder.bitcast(load(builder, pointer, words, 2), pairs))
                for row, part in zip(right.pointers, parts, strict=True):
                    prefetch(builder, builder.gep(row, [builder.add(place, later)]))
                    packed = load(builder, builder.gep(row, [place]), words, 1)
                    total = builder.load(part)
                    for i, activation in enumerate(activations):
                        index = builder.lshr(packed, ir.Constant(words, [4 * i] * 32)) if i else packed
                        values = builder.bitcast(builder.call(lookup, [multiples, index]), pairs)
                        total = builder.call(dot, [total, values, activation])
                    builder.store(total, part)
            for row, part, cell in zip(factors.pointers, parts, cells, strict=True):
                factor = splat(builder, builder.load(builder.gep(row, [groups.index])), LANES)
                builder.store(_fma(builder, factor, builder.load(part), builder.load(cell)), cell)
        _finish(context, builder, signature, args, 5, cells)
        return context.get_dummy_value()

    return types.void(x, weight, first_weight, scale, group, out), codegen


def arranged_for_pairs(x: torch.Tensor, groups: int) -> torch.Tensor:
    """(rows, k): each 128 activations that meet 64 bytes of weights, in the order of the weights' nibbles."""
    rows, columns = x.shape
    # (half of the group, 64 bytes, word, byte of the word) -> (64 bytes, byte of the word, half, word)
    parts = x.view(rows, groups, 2, columns // groups // 128, 32, 2)
    return parts.permute(0, 1, 3, 5, 2, 4).reshape(rows, columns)
