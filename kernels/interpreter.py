"""Triton's interpreter (``TRITON_INTERPRET=1``), where kernels run on the CPU, made right for products.

Triton 3.6 to 3.9 keep bfloat16 as 16-bit integers and forget so in three places:

- ``tl.dot`` multiplies the integers (triton-lang/triton#4972, #5424, #11584);
- arithmetic and comparisons between bfloat16 tensors are those of the integers;
- float32 becomes bfloat16 by truncation, where a GPU rounds to the nearest, ties to even.

``repair`` replaces the three methods behind them: operands are widened to float32, which is exact, and
results rounded as a GPU rounds them. float16 operands of a dot are widened too, for NumPy has no fast product
of them.

Products of floats are also summed in one order. NumPy's product rounds differently for other shapes: a third
of the scores q k^T differ from those of k q^T in the last bit. Attention's backward kernels compute the
scores again, transposed, against the sums of the forward one, and on a GPU find the same bits, because there
an element's sum depends on its row and its column alone. Here too: ``DEPTH`` products are added to the
accumulator exactly and rounded once to float32, as a matrix instruction does.

Not repaired: fp8, scaled dots, and functions of one bfloat16 argument, most of which Triton refuses.

``TRITON_INTERPRET`` is read where ``@triton.jit`` decorates: a process either interprets or compiles.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

DEPTH = 8
"""Products that one matrix instruction adds to the accumulator: those of float32's 19-bit format take 8."""


def interpreting() -> bool:
    """Does this process interpret its Triton kernels?"""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def repair() -> None:
    """Make bfloat16 and products right in this process's interpreter; a second call does nothing.

    RuntimeError when this Triton has not the private functions that are replaced.
    """
    import numpy as np
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    builder = getattr(interpreter, "InterpreterBuilder", None)
    handle: Any = getattr(interpreter, "TensorHandle", None)
    names = ("create_dot", "binary_op", "cast_impl")
    missing = [name for name in names if not hasattr(builder, name)]
    if handle is None:
        missing.append("TensorHandle")
    if missing:
        raise RuntimeError(
            f"the interpreter of triton {triton.__version__} is another than the one known here (missing: "
            f"{', '.join(missing)}): check whether it computes with bfloat16, then change "
            "kernels/interpreter.py; 3.6 to 3.9 are known"
        )
    create_dot, binary_op, cast_impl = (getattr(builder, name) for name in names)

    def widened(tensor: Any) -> Any:
        """The same values as float32."""
        if tensor.dtype.scalar == tl.bfloat16:
            return handle((tensor.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        if tensor.dtype.scalar == tl.float16:
            return handle(tensor.data.astype(np.float32), tl.float32)
        return tensor

    def rounded(values: Any) -> Any:
        """Numbers as bfloat16 patterns: nearest, ties to even; NaN stays NaN."""
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where((bits & 0x7FFFFFFF) > 0x7F800000, np.uint16(0x7FC0), nearest).reshape(values.shape)

    def dot(self: Any, left: Any, right: Any, total: Any, *rest: Any, **options: Any) -> Any:
        left, right = widened(left), widened(right)
        if {left.data.dtype, right.data.dtype, total.data.dtype} != {np.dtype(np.float32)}:
            return create_dot(self, left, right, total, *rest, **options)
        a, b, values = left.data.astype(np.float64), right.data.astype(np.float64), total.data
        for k in range(0, a.shape[-1], DEPTH):
            values = (values + a[..., k : k + DEPTH] @ b[..., k : k + DEPTH, :]).astype(np.float32)
        return handle(values, total.dtype.scalar)

    def binary(self: Any, left: Any, right: Any, operation: Any) -> Any:
        if left.dtype.scalar != tl.bfloat16:
            return binary_op(self, left, right, operation)
        values = operation(widened(left).data, widened(right).data)
        return handle(values if values.dtype == bool else rounded(values), tl.bfloat16)

    def cast(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar == tl.bfloat16:
            source = widened(source)
        if kind.scalar == tl.bfloat16:
            return handle(rounded(source.data), tl.bfloat16)
        return cast_impl(self, source, kind)

    for name, replacement in zip(names, (dot, binary, cast), strict=True):
        setattr(builder, name, replacement)
