"""Compiled functions that other compiled functions call by their address.

numba compiles what an njit function calls anew into every caller. For large kernels that several bodies
share, such as those of ``kernels.tiles``, that is seconds for each. ``compiled_once`` compiles such a
function when the first body that uses it is compiled; the bodies call it by a symbol.

Its arguments are numbers; memory is given by address: ``address(array, index)`` on the one side,
``floats_at(address, count)`` on the other. The caller keeps the arrays alive during the call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.compiled_cache import address_of, provide, require
from kernels.threads import pointer_to

_LONG = ir.IntType(64)


def compiled_once(floats: tuple[str, ...] = (), fastmath: tuple[str, ...] = ("contract",)) -> Any:
    """Decorator: what numba functions call in place of ``function``, which returns nothing.

    Its arguments are int64 but for those named in ``floats``, which are float32. ``.compiled`` is an njit
    function of the same, to be looked at with ``kernels.inspect``; ``.kinds`` are its argument types.
    """

    def decorate(function: Callable[..., None]) -> Any:
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        kinds = tuple(types.float32 if name in floats else types.int64 for name in names)
        options = {"error_model": "numpy", "fastmath": set(fastmath)}

        symbol = f"perflab_{function.__module__}_{function.__qualname__}".replace(".", "_")
        kept = []

        @cache
        def entry() -> int:
            address, code = address_of(types.void(*kinds), function, options)
            kept.append(code)
            return address

        provide(symbol, entry)

        def typed(typing: Any, *arguments: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                require(symbol)
                kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in args])
                builder.call(cgutils.get_or_insert_function(builder.module, kind, symbol), args)
                return context.get_dummy_value()

            return types.void(*kinds), codegen

        # An intrinsic's arguments are counted from its signature.
        space: dict[str, Any] = {"typed": typed}
        listed = ", ".join(names)
        exec(f"def {function.__name__}(typing, {listed}):\n    return typed(typing, {listed})", space)
        call = intrinsic(space[function.__name__])
        call.__doc__ = function.__doc__
        call.compiled, call.kinds = njit(**options)(function), kinds
        return call

    return decorate


@intrinsic
def address(typing: Any, array: Any, index: Any) -> Any:
    """The address of element ``index`` of a C-contiguous array, counted in one dimension.

    ``array`` may also be the address of a float32: scratch memory is cut up by address, since each slice that
    numba knows as an array costs as much compilation as a loop.
    """
    if isinstance(array, types.Integer):

        def shifted(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.add(args[0], builder.shl(args[1], _LONG(2)))

        return types.int64(types.int64, types.int64), shifted
    if not isinstance(array, types.Array) or array.layout != "C":
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(builder.gep(data, [args[1]]), _LONG)

    return types.int64(array, types.int64), codegen


@intrinsic
def aligned(typing: Any, array: Any) -> Any:
    """The first address in an array that is a multiple of 64 bytes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        place = builder.add(builder.ptrtoint(data, _LONG), _LONG(63))
        return builder.and_(place, _LONG(-64))

    return types.int64(array), codegen


@intrinsic
def keep_alive(typing: Any, array: Any) -> Any:
    """Nothing; numba frees an array after the last line that names it, whatever addresses are in use."""
    return types.void(array), lambda context, builder, signature, args: context.get_dummy_value()


def _elements_at(element: types.Type, doc: str) -> Any:
    pointer = pointer_to(element)

    @njit(forceinline=True)
    def elements_at(address: Any, count: Any) -> Any:
        return numba.carray(pointer(address), (count,))

    elements_at.__doc__ = doc
    return elements_at


floats_at = _elements_at(types.float32, "The float32 array of ``count`` elements at an address.")
booleans_at = _elements_at(types.boolean, "The bool array of ``count`` elements at an address.")
halves_at = _elements_at(types.int16, "IEEE half precision at an address, for ``kernels.storage.widen``.")
bfloats_at = _elements_at(types.uint16, "bfloat16 at an address, for ``kernels.storage.widen``.")
