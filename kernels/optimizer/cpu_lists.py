"""One launch over lists of tensors: a table of addresses, cut into chunks of equal work.

A model has hundreds of small tensors. Launched one by one they cost more than their arithmetic, so a rule's
loop is given a table with the address of every tensor, and chunks of the elements of all of them laid end to
end: a chunk may hold many small tensors, a large tensor many chunks.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from kernels.op import FLOATS_AND_DOUBLE
from kernels.optimizer.lists import Tensors, address_of, check_equal, copy_back, elements_of, one_layout
from kernels.threads import Chunked, chunked

ELEMENTS_PER_CHUNK = 1 << 16
"""Work of one chunk: some ten microseconds, several times what a thread pays to take the next one."""

# --- inside the loops ----------------------------------------------------------------------------


@intrinsic
def number(typing: Any, value: Any, like: Any) -> Any:
    """A float64 in the precision of the arithmetic: float64 for float64 elements, float32 for all others."""
    kind = types.float64 if like.dtype is types.float64 else types.float32

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.cast(builder, args[0], signature.args[0], kind)

    return kind(value, like), codegen


@intrinsic
def _pointer(typing: Any, address: Any, offset: Any, like: Any) -> Any:
    """Pointer to element ``offset`` of the memory at ``address``, of the element type of ``like``."""
    kind = types.CPointer(like.dtype)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(builder.inttoptr(args[0], context.get_value_type(kind)), [args[1]])

    return kind(address, offset, like), codegen


@intrinsic
def distinct(typing: Any) -> Any:
    """Promise that the arrays given to this function do not overlap (LLVM's ``noalias``).

    LLVM tests that at run time for a few arrays, gives up where there are five, and leaves the loop scalar.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for argument in builder.function.args[2:]:  # behind numba's own two: the result and the error
            if isinstance(argument.type, ir.PointerType):
                argument.add_attribute("noalias")
        return context.get_dummy_value()

    return types.void(), codegen


def _part(address, offset, count, like):
    """``count`` elements from ``offset`` of the tensor at ``address``; None where there is no such list."""


@overload(_part)
def _part_compiled(address, offset, count, like):
    if isinstance(like, types.NoneType):
        return lambda address, offset, count, like: None
    return lambda address, offset, count, like: numba.carray(_pointer(address, offset, like), (count,))


def update_rule(function: Callable[..., None]) -> Any:
    """Compile ``function(param, grad, first, second, third, step, numbers)``, a rule's loop over arrays.

    A state that the rule has not is None. step is the number of this update, numbers are the hyperparameters
    as float64. The loop says ``full_width()`` and ``distinct()``.
    """
    return numba.njit(error_model="numpy", fastmath={"contract"}, nogil=True)(function)


def over_lists(rule: Any) -> Chunked:
    """The launch of ``rule`` over a table of lists, chunk by chunk."""

    def body(chunk, size, table, steps, p, g, a, b, c, numbers):
        begin = chunk * size
        end = min(begin + size, table[0, table.shape[1] - 1])
        index, above = 0, table.shape[1] - 1  # the last tensor that starts at ``begin`` or before
        while above - index > 1:
            middle = (index + above) // 2
            if table[0, middle] <= begin:
                index = middle
            else:
                above = middle
        while begin < end:
            offset = begin - table[0, index]
            count = min(end, table[0, index + 1]) - begin
            step = 0.0
            if steps is not None:
                step = float(_part(table[1, index], 0, 1, steps)[0])
            rule(
                _part(table[2, index], offset, count, p),
                _part(table[3, index], offset, count, g),
                _part(table[4, index], offset, count, a),
                _part(table[5, index], offset, count, b),
                _part(table[6, index], offset, count, c),
                step,
                numbers,
            )
            begin += count
            index += 1

    body.__name__ = rule.__name__
    return chunked(body)


@chunked
def _count(chunk, table, steps):
    """One more step for every tensor."""
    for index in range(table.shape[1] - 1):
        step = _part(table[1, index], 0, 1, steps)
        step[0] += 1


# --- the launch ----------------------------------------------------------------------------------


_EMPTY = {dtype: torch.empty(0, dtype=dtype) for dtype in FLOATS_AND_DOUBLE}
"""Says an element type to a compiled loop."""


def _table(lists: Sequence[Tensors]) -> torch.Tensor:
    """int64 (1 + lists, tensors + 1): where each tensor's elements start end to end, then addresses."""
    columns = len(lists[1]) + 1
    words = array("q", accumulate(map(elements_of, lists[1]), initial=0))
    for tensors in lists:
        words.extend(map(address_of, tensors))
        words.extend([0] * (columns - len(tensors)))
    return torch.frombuffer(words, dtype=torch.int64).view(-1, columns)


def launch(
    body: Chunked,
    params: Tensors,
    grads: Tensors,
    states: Sequence[Tensors],
    steps: Tensors,
    numbers: Sequence[float],
) -> None:
    """Update ``params`` and ``states`` in place by the rule of ``body``, counting ``steps`` up first.

    params, grads, each non-empty list of states: as many tensors, of one dtype in a list, tensors of one
    index of one shape. A state list is empty where the rule has no such state, ``steps`` where it counts
    none. Tensors that do not lie in one layout are updated in contiguous copies. ValueError where sizes or
    dtypes differ.
    """
    check_equal(params, grads, states, steps)
    lists, copies = one_layout(params, grads, states)
    table = _table([steps, *lists])
    kinds = [_EMPTY[tensors[0].dtype] if tensors else None for tensors in (steps, *lists)]
    if steps:
        _count(1, table, kinds[0])
    chunks = -(-sum(map(elements_of, params)) // ELEMENTS_PER_CHUNK)
    body(
        chunks, ELEMENTS_PER_CHUNK, table, *kinds, torch.frombuffer(array("d", numbers), dtype=torch.float64)
    )
    copy_back(copies)
    torch.autograd.graph.increment_version(chain(params, *states, steps))
