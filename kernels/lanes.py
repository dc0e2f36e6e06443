"""Sixteen numbers as one value in numba: for loops whose results are streamed past the caches.

LLVM vectorises plain loops by itself, but no loop with a non-temporal store: the alignment such a store
needs holds for sixteen elements, not for one. ``load_16`` gives ``Lanes``, which know ``+``, ``-`` and ``*``
with each other and with float32 numbers; ``stream_lanes`` stores them. A formula written as an inlined
function of numbers works on lanes too, so that vectors and what remains of a row share it:

    for j in range(0, columns, 16):
        stream_lanes(out, j, formula(load_16(row, j), load_16(weight, j), scale))

Elements are as in ``kernels.storage``: 16-bit floats are widened to float32, and rounded to nearest even when
stored. Registers narrower than 512 bits take two or four instructions each.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from kernels import ir_vectors
from kernels.storage import narrowed, widened

LANES = 16


class _LanesType(types.Type):
    def __init__(self) -> None:
        super().__init__(name="Lanes")


Lanes = _LanesType()
_VECTOR = ir.VectorType(ir.FloatType(), LANES)


@register_model(_LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


def _spread(builder: Any, number: Any) -> Any:
    """The number in all lanes; lanes as they are."""
    if number.type == _VECTOR:
        return number
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), number, ir.IntType(32)(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))


def _define(function: Any, instruction: str) -> None:
    @infer_global(function)
    class Typing(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if Lanes in args and all(kind in (Lanes, types.float32) for kind in args):
                return signature(Lanes, *args)
            return None

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        left, right = (_spread(builder, value) for value in args)
        return getattr(builder, instruction)(left, right, flags=("contract",))

    for kinds in ((Lanes, Lanes), (Lanes, types.float32), (types.float32, Lanes)):
        lower_builtin(function, *kinds)(lower)


for _function, _instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul")):
    _define(_function, _instruction)


def _place(context: Any, builder: Any, kind: Any, array: Any, offset: Any) -> Any:
    """Pointer to sixteen elements of a one-dimensional array from ``offset`` on."""
    data = context.make_array(kind)(context, builder, array).data
    element = context.get_data_type(kind.dtype)
    return builder.bitcast(builder.gep(data, [offset]), ir.VectorType(element, LANES).as_pointer())


@intrinsic
def load_16(typing: Any, array: Any, offset: Any) -> Any:
    """array[offset:offset+16] as float32 lanes; a C-contiguous row of float32 or 16-bit floats."""
    if not ir_vectors.is_row(array, offset) or array.dtype not in (types.float32, types.int16, types.uint16):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(_place(context, builder, signature.args[0], *args))
        value.align = array.dtype.bitwidth // 8
        return widened(builder, value, array.dtype)

    return Lanes(array, offset), codegen


def _store(alignment: int | None, doc: str) -> Any:
    """An intrinsic that stores lanes; with an alignment in elements, past the caches."""

    @intrinsic
    def store(typing: Any, array: Any, offset: Any, value: Any) -> Any:
        if value is not Lanes or not ir_vectors.is_row(array, offset):
            return None

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            elements = narrowed(builder, args[2], array.dtype)
            stored = builder.store(elements, _place(context, builder, signature.args[0], args[0], args[1]))
            stored.align = (alignment or 1) * array.dtype.bitwidth // 8
            if alignment:
                one = ir.Constant(ir.IntType(32), 1)
                stored.set_metadata("nontemporal", builder.module.add_metadata([one]))
            return context.get_dummy_value()

        return types.void(array, offset, value), codegen

    store.__doc__ = doc
    return store


store_16 = _store(None, "array[offset:offset+16] = value.")
stream_lanes = _store(
    LANES,
    """array[offset:offset+16] = value, written past the caches (non-temporal).

    The address must be a multiple of the bytes of sixteen elements (64 for float32, else 32): at any other
    the program is killed. Call ``kernels.simd.store_fence()`` before another thread may read.
    """,
)
