"""Sixteen pairs of coordinates turned at once, as LLVM vectors.

A head has 32 to 128 pairs: too few for the loop vectoriser, whose unrolled body of 64 would never run. Here
the vectors are written out; where the CPU has narrower registers LLVM splits them.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

LANES = 16
_FLOAT = ir.FloatType()
_WORD = ir.IntType(32)
_FLOATS, _HALVES = ir.VectorType(_FLOAT, LANES), ir.VectorType(ir.HalfType(), LANES)
_WORDS, _SHORTS = ir.VectorType(_WORD, LANES), ir.VectorType(ir.IntType(16), LANES)


def _all(value: int) -> ir.Constant:
    return ir.Constant(_WORDS, [value] * LANES)


def _address(context: Any, builder: Any, kind: Any, array: Any, offset: Any) -> tuple[Any, int]:
    """Pointer to a vector at array[offset], and the element's bytes."""
    data = context.make_array(kind)(context, builder, array).data
    vector = _FLOATS if kind.dtype is types.float32 else _SHORTS
    return builder.bitcast(builder.gep(data, [offset]), vector.as_pointer()), kind.dtype.bitwidth // 8


def _load(context: Any, builder: Any, kind: Any, array: Any, offset: Any) -> Any:
    """array[offset : offset + 16] as float32; int16 is half, uint16 bfloat16 (kernels/storage.py)."""
    pointer, size = _address(context, builder, kind, array, offset)
    value = builder.load(pointer)
    value.align = size
    if kind.dtype is types.int16:
        return builder.fpext(builder.bitcast(value, _HALVES), _FLOATS)
    if kind.dtype is types.uint16:
        return builder.bitcast(builder.shl(builder.zext(value, _WORDS), _all(16)), _FLOATS)
    return value


def _store(context: Any, builder: Any, kind: Any, array: Any, offset: Any, value: Any) -> None:
    """array[offset : offset + 16] = value, rounded to nearest even as ``kernels.storage.narrow`` does."""
    if kind.dtype is types.int16:
        value = builder.bitcast(builder.fptrunc(value, _HALVES), _SHORTS)
    elif kind.dtype is types.uint16:
        bits = builder.bitcast(value, _WORDS)
        odd = builder.and_(builder.lshr(bits, _all(16)), _all(1))
        rounded = builder.add(builder.add(bits, odd), _all(0x7FFF))
        is_nan = builder.fcmp_unordered("uno", value, value)
        chosen = builder.select(is_nan, builder.or_(bits, _all(0x00400000)), rounded)
        value = builder.trunc(builder.lshr(chosen, _all(16)), _SHORTS)
    pointer, size = _address(context, builder, kind, array, offset)
    builder.store(value, pointer).align = size


def _spread(builder: Any, value: Any) -> Any:
    lane = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), value, _WORD(0))
    return builder.shuffle_vector(lane, ir.Constant(_FLOATS, ir.Undefined), _all(0))


def _chosen(builder: Any, left: Any, right: Any, lanes: list[int]) -> Any:
    """Lanes of the two vectors side by side."""
    return builder.shuffle_vector(left, right, ir.Constant(ir.VectorType(_WORD, len(lanes)), lanes))


def _rotation(interleaved: bool) -> Any:
    @intrinsic
    def rotate(typing, x, out, first, second, out_first, out_second, cos, sin, angle, sign):
        arrays = (x, out, cos, sin)
        if any(a.dtype not in (types.float32, types.int16, types.uint16) for a in arrays):
            return None

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kinds = signature.args
            a = _load(context, builder, kinds[0], args[0], args[2])
            b = _load(context, builder, kinds[0], args[0], args[3])
            c = _load(context, builder, kinds[6], args[6], args[8])
            s = _load(context, builder, kinds[7], args[7], args[8])
            s = builder.fmul(s, _spread(builder, args[9]))
            if interleaved:
                even, odd = list(range(0, 2 * LANES, 2)), list(range(1, 2 * LANES, 2))
                a, b = _chosen(builder, a, b, even), _chosen(builder, a, b, odd)
            flags = ("contract",)
            turned = (
                builder.fsub(builder.fmul(a, c, flags), builder.fmul(b, s, flags), flags=flags),
                builder.fadd(builder.fmul(b, c, flags), builder.fmul(a, s, flags), flags=flags),
            )
            if interleaved:
                low = [lane for pair in range(LANES // 2) for lane in (pair, pair + LANES)]
                high = [lane + LANES // 2 for lane in low]
                turned = _chosen(builder, *turned, low), _chosen(builder, *turned, high)
            _store(context, builder, kinds[1], args[1], args[4], turned[0])
            _store(context, builder, kinds[1], args[1], args[5], turned[1])
            return context.get_dummy_value()

        offsets = (types.int64,) * 4
        return types.void(x, out, *offsets, cos, sin, types.int64, types.float32), codegen

    return rotate


rotate_halves = _rotation(interleaved=False)
"""rotate_halves(x, out, first, second, out_first, out_second, cos, sin, angle, sign): x[first:first+16] and
x[second:second+16] turned by cos[angle:angle+16] and sign * sin[...], written to out in the same order."""

rotate_neighbours = _rotation(interleaved=True)
"""As ``rotate_halves``, but the pairs are neighbours: element 2k and 2k + 1 of x[first:] and x[second:]."""
