"""Pieces of LLVM IR that hand-written loops are made of: pointers into arrays, vectors, prefetches.

Used inside the ``codegen`` of a numba intrinsic. Importing this compiles nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

BYTE, SHORT, WORD, LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOAT = ir.FloatType()


class BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:  # llvmlite compares types, not their names
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


def bfloat16_bits(number: float) -> int:
    """The 16 bits of a number that is exact in bfloat16."""
    return int(np.array([number], np.float32).view(np.uint32)[0]) >> 16


# --- functions and memory ------------------------------------------------------------------------


def declare(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """The function of this name, declared in the builder's module when it is first asked for."""
    found = builder.module.globals.get(name)
    return found or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def is_row(array: Any, offset: Any) -> bool:
    """Whether these are the types of a vector whose elements lie side by side and of a place in it."""
    return (
        isinstance(array, types.Array)
        and array.ndim == 1
        and array.layout == "C"
        and isinstance(offset, types.Integer)
    )


def address(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    """Pointer to the first element of a numba array."""
    return context.make_array(kind)(context, builder, array).data


def pointer_at(context: Any, builder: Any, signature: Any, args: Any, index: int, offset: Any) -> Any:
    """Pointer to element ``offset`` of the array that is argument ``index``."""
    return builder.gep(address(context, builder, signature.args[index], args[index]), [offset])


def load(builder: Any, pointer: Any, kind: Any, alignment: int) -> Any:
    """A value of type ``kind`` at a multiple of ``alignment`` bytes."""
    value = builder.load(builder.bitcast(pointer, kind.as_pointer()))
    value.align = alignment
    return value


def store(builder: Any, value: Any, pointer: Any, alignment: int) -> None:
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer())).align = alignment


def prefetch(builder: Any, pointer: Any, to_write: bool = False) -> None:
    """Ask for a cache line: in the second level, or to write to it, in the first. Outside of memory it does
    nothing."""
    kinds = [BYTE.as_pointer(), WORD, WORD, WORD]
    fetch = declare(builder, "llvm.prefetch.p0", ir.VoidType(), kinds)
    how = [WORD(1), WORD(3)] if to_write else [WORD(0), WORD(2)]
    builder.call(fetch, [builder.bitcast(pointer, kinds[0]), *how, WORD(1)])


# --- vectors -------------------------------------------------------------------------------------


def splat(builder: Any, value: Any, lanes: int) -> Any:
    """The number in all lanes; with one lane, the number."""
    if lanes == 1:
        return value
    vector = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    for lane in range(lanes):
        vector = builder.insert_element(vector, value, WORD(lane))
    return vector


def shuffle(builder: Any, left: Any, right: Any, lanes: Iterable[int]) -> Any:
    """A vector of these lanes of two vectors, the right one's counted on from the left one's."""
    lanes = list(lanes)
    return builder.shuffle_vector(left, right, ir.Constant(ir.VectorType(WORD, len(lanes)), lanes))


def total(builder: Any, values: list[Any], lanes: int) -> Any:
    """Sum of all lanes of all vectors; uses every accumulator, so that none is dead."""
    vector = values[0]
    for value in values[1:]:
        vector = builder.fadd(vector, value)
    if lanes == 1:
        return vector
    total = builder.extract_element(vector, WORD(0))
    for lane in range(1, lanes):
        total = builder.fadd(total, builder.extract_element(vector, WORD(lane)))
    return total
