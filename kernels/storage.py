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


@intrinsic
def widen(typing: Any, element: Any) -> Any:
    """An element as a number: 16-bit floats as float32, float32 and float64 as they are."""
    kind = _INTEGERS.get(element)
    if kind is None:
        if element not in (types.float32, types.float64):
            return None
        return element(element), lambda context, builder, signature, args: args[0]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if kind == "half":
            return builder.fpext(builder.bitcast(args[0], _HALF), _FLOAT)
        return builder.bitcast(builder.shl(builder.zext(args[0], _WORD), _WORD(16)), _FLOAT)

    return types.float32(element), codegen


@intrinsic
def narrow(typing: Any, value: Any, like: Any) -> Any:
    """A float in the element type of the array ``like``, rounded to nearest, ties to even; NaN stays NaN."""
    if not isinstance(like, types.Array) or value not in (types.float32, types.float64):
        return None
    element = like.dtype
    kind = _INTEGERS.get(element)
    if kind is None and element not in (types.float32, types.float64):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = args[0]
        if kind is None:
            return context.cast(builder, number, signature.args[0], element)
        number = context.cast(builder, number, signature.args[0], types.float32)
        if kind == "half":
            return builder.bitcast(builder.fptrunc(number, _HALF), _SHORT)
        bits = builder.bitcast(number, _WORD)
        odd = builder.and_(builder.lshr(bits, _WORD(16)), _WORD(1))
        rounded = builder.add(builder.add(bits, odd), _WORD(0x7FFF))
        quiet = builder.or_(bits, _WORD(0x00400000))  # a NaN: rounding could carry it over into infinity
        is_nan = builder.icmp_unsigned(">", builder.and_(bits, _WORD(0x7FFFFFFF)), _WORD(0x7F800000))
        return builder.trunc(builder.lshr(builder.select(is_nan, quiet, rounded), _WORD(16)), _SHORT)

    return element(value, like), codegen
