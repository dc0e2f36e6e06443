"""Element-wise reductions over the tensors of several ranks, in numba: the arithmetic of ``parallel.shm``.

A reduction is a C function ``(destination, sources, members, bytes, scratch, factor)``: ``sources`` is a
table of the addresses of what each rank contributes, always in the order of ranks, so that every rank that
computes it gets the same bits. 16-bit floats are summed in float32 and rounded once. AVG divides the sum;
PREMUL_SUM multiplies each contribution by ``factor`` (the bits of a float64) first, as NCCL does. MIN and
MAX keep NaN.

Compiled once for a machine and pair of dtype and operation (``kernels.compiled_cache``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from numba import njit, types

from kernels.compiled_cache import address_of
from kernels.simd import full_width
from kernels.storage import narrow, widen
from kernels.threads import as_float, pointer_to

SCRATCH_BYTES = 16384
"""What a reduction keeps between two contributions; stays in the first-level cache."""

_HALVES = {torch.float16: types.int16, torch.bfloat16: types.uint16}  # as kernels.storage reads them
_NUMBERS = {
    torch.float32: types.float32,
    torch.float64: types.float64,
    torch.int8: types.int8,
    torch.int16: types.int16,
    torch.int32: types.int32,
    torch.int64: types.int64,
    torch.uint8: types.uint8,
    torch.uint16: types.uint16,
    torch.uint32: types.uint32,
    torch.uint64: types.uint64,
    torch.bool: types.uint8,
}
_AS_BITS = {"SUM": "BOR", "MAX": "BOR", "PRODUCT": "BAND", "MIN": "BAND"}  # what they mean for truth values


def _operators() -> dict[str, Callable[[Any, Any], Any]]:
    def added(a: Any, b: Any) -> Any:
        return a + b

    def multiplied(a: Any, b: Any) -> Any:
        return a * b

    def least(a: Any, b: Any) -> Any:
        return a if a < b or a != a else b

    def greatest(a: Any, b: Any) -> Any:
        return a if a > b or a != a else b

    def both(a: Any, b: Any) -> Any:
        return a & b

    def either(a: Any, b: Any) -> Any:
        return a | b

    def differing(a: Any, b: Any) -> Any:
        return a ^ b

    return {
        "SUM": added,
        "AVG": added,
        "PREMUL_SUM": added,
        "PRODUCT": multiplied,
        "MIN": least,
        "MAX": greatest,
        "BAND": both,
        "BOR": either,
        "BXOR": differing,
    }


def supported(dtype: torch.dtype, operation: str) -> str | None:
    """None where ``reduction(dtype, operation)`` exists, else what would."""
    if dtype not in _NUMBERS and dtype not in _HALVES:
        return f"numbers of {', '.join(str(known)[6:] for known in (*_HALVES, *_NUMBERS))}"
    floating = dtype.is_floating_point
    if operation in ("BAND", "BOR", "BXOR") and floating:
        return f"SUM, AVG, PRODUCT, MIN or MAX on {dtype}, {operation} on integers"
    if operation == "PREMUL_SUM" and not floating:
        return "PREMUL_SUM on floats"
    if operation == "AVG" and dtype == torch.bool:
        return "MAX or MIN on bool"
    return None if operation in _operators() else "SUM, AVG, PRODUCT, MIN, MAX, PREMUL_SUM, BAND, BOR or BXOR"


@cache
def reduction(dtype: torch.dtype, operation: str) -> tuple[int, Any]:
    """(address of the C function, what keeps it alive). TypeError where ``supported`` says so."""
    other = supported(dtype, operation)
    if other is not None:
        raise TypeError(f"shm does not reduce {dtype} with {operation}; it takes {other}")
    if dtype == torch.bool:
        operation = _AS_BITS.get(operation, operation)
    element = _HALVES.get(dtype) or _NUMBERS[dtype]
    body = _body(element, dtype in _HALVES, dtype.is_floating_point, operation)
    return address_of(types.void(*[types.int64] * 6), body, {"error_model": "numpy"})


def _body(element: Any, half: bool, floating: bool, operation: str) -> Callable[..., None]:
    number = types.float32 if half else element
    as_elements, as_numbers = pointer_to(element), pointer_to(number)
    as_addresses = pointer_to(types.int64)
    size = element.bitwidth // 8
    block = SCRATCH_BYTES // (number.bitwidth // 8)
    combine = njit(forceinline=True)(_operators()[operation])

    # Both take the array whose element type the number has: an integer sum in numba is as wide as int64.
    if half:

        def loaded(x: Any, factor: Any) -> Any:
            return widen(x)

        def stored(value: Any, like: Any) -> Any:
            return narrow(np.float32(value), like)
    else:

        def loaded(x: Any, factor: Any) -> Any:
            return x

        def stored(value: Any, like: Any) -> Any:
            return number(value)

    if operation == "PREMUL_SUM":
        load_plain = njit(forceinline=True)(loaded)

        def scaled(x: Any, factor: Any) -> Any:
            return load_plain(x, factor) * number(factor)

        load = njit(forceinline=True)(scaled)
    else:
        load = njit(forceinline=True)(loaded)

    store = njit(forceinline=True)(stored)

    if operation == "AVG" and floating:

        def finished(total: Any, members: Any) -> Any:
            return total / number(members)
    elif operation == "AVG":

        def finished(total: Any, members: Any) -> Any:
            return number(total) // number(members)
    else:

        def finished(total: Any, members: Any) -> Any:
            return total

    finish = njit(forceinline=True)(finished)

    def reduce(
        destination: Any, sources: Any, members: Any, bytes_each: Any, scratch: Any, bits: Any
    ) -> None:
        full_width()
        count = bytes_each // size
        factor = as_float(bits)
        table = numba.carray(as_addresses(sources), (members,))
        out = numba.carray(as_elements(destination), (count,))
        first = numba.carray(as_elements(table[0]), (count,))
        second = numba.carray(as_elements(table[1]), (count,))
        if members == 2:
            for i in range(count):
                total = combine(load(first[i], factor), load(second[i], factor))
                out[i] = store(finish(total, members), out)
            return
        kept = numba.carray(as_numbers(scratch), (block,))
        last = numba.carray(as_elements(table[members - 1]), (count,))
        for start in range(0, count, block):
            n = min(block, count - start)
            for i in range(n):
                kept[i] = combine(load(first[start + i], factor), load(second[start + i], factor))
            for member in range(2, members - 1):
                source = numba.carray(as_elements(table[member]), (count,))
                for i in range(n):
                    kept[i] = combine(kept[i], load(source[start + i], factor))
            for i in range(n):
                total = combine(kept[i], load(last[start + i], factor))
                out[start + i] = store(finish(total, members), out)

    reduce.__name__ = f"reduce_{element}_{'half' if half else 'number'}_{operation}"
    return reduce
