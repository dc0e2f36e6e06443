"""16-bit floats in numba: loaded as float32, stored rounded to nearest even, sixteen at a time.

numba has no 16-bit floats on a CPU. Tensors of them reach compiled functions as integers
(``kernels.threads.ELEMENTS``): int16 holds IEEE half precision, uint16 holds bfloat16, the upper half of a
float32. ``widen`` and ``narrow`` do the right thing for each element type, float32 and float64 included, so
that one function body serves all; the conversions are plain instructions, and loops over them vectorise
(VCVTPH2PS, VCVTPS2PH for half; shifts and adds for bfloat16).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_FLOAT, _HALF, _WORD, _SHORT = ir.FloatType(), ir.HalfType(), ir.IntType(32), ir.IntType(16)
_INTEGERS = {types.int16: "half", types.uint16: "bfloat16"}


def _as_many(kind: Any, value: Any) -> Any:
    """The scalar LLVM type, or a vector of it where ``value`` is a vector."""
    return ir.VectorType(kind, value.type.count) if isinstance(value.type, ir.VectorType) else kind


def widened(builder: Any, value: Any, element: Any) -> Any:
    """LLVM: stored elements of this numba type (one, or a vector) as numbers, 16-bit floats as float32."""
    kind = _INTEGERS.get(element)
    if kind is None:
        return value
    if kind == "half":
        return builder.fpext(builder.bitcast(value, _as_many(_HALF, value)), _as_many(_FLOAT, value))
    bits = builder.zext(value, _as_many(_WORD, value))
    return builder.bitcast(builder.shl(bits, _constant(bits, 16)), _as_many(_FLOAT, value))


def narrowed(builder: Any, number: Any, element: Any) -> Any:
    """LLVM: float32 numbers (one, or a vector) as stored elements of a 16-bit type; others as they are.

    Rounded to nearest, ties to even; NaN stays NaN.
    """
    kind = _INTEGERS.get(element)
    if kind is None:
        return number
    if kind == "half":
        half = builder.fptrunc(number, _as_many(_HALF, number))
        return builder.bitcast(half, _as_many(_SHORT, number))
    bits = builder.bitcast(number, _as_many(_WORD, number))
    odd = builder.and_(builder.lshr(bits, _constant(bits, 16)), _constant(bits, 1))
    rounded = builder.add(builder.add(bits, odd), _constant(bits, 0x7FFF))
    quiet = builder.or_(bits, _constant(bits, 0x00400000))  # rounding could carry a NaN over into infinity
    magnitude = builder.and_(bits, _constant(bits, 0x7FFFFFFF))
    is_nan = builder.icmp_unsigned(">", magnitude, _constant(bits, 0x7F800000))
    chosen = builder.lshr(builder.select(is_nan, quiet, rounded), _constant(bits, 16))
    return builder.trunc(chosen, _as_many(_SHORT, number))


def _constant(like: Any, number: int) -> Any:
    vector = isinstance(like.type, ir.VectorType)
    return ir.Constant(like.type, [number] * like.type.count if vector else number)


@intrinsic
def widen(typing: Any, element: Any) -> Any:
    """An element as a number: 16-bit floats as float32, float32 and float64 as they are."""
    if element not in (*_INTEGERS, types.float32, types.float64):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return widened(builder, args[0], element)

    return (types.float32 if element in _INTEGERS else element)(element), codegen


@intrinsic
def narrow(typing: Any, value: Any, like: Any) -> Any:
    """A float in the element type of the array ``like``, rounded to nearest, ties to even; NaN stays NaN."""
    if not isinstance(like, types.Array) or value not in (types.float32, types.float64):
        return None
    element = like.dtype
    if element not in (*_INTEGERS, types.float32, types.float64):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target = types.float32 if element in _INTEGERS else element
        return narrowed(builder, context.cast(builder, args[0], signature.args[0], target), element)

    return element(value, like), codegen
