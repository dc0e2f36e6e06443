"""Cache lines asked for before a loop comes to them, in numba.

The hardware asks ahead for what is read in a row, up to the end of a page of 4 KiB, but hardly for what is
written: a store takes its line from the last level or from memory only when it is made, and a core has room
for a few dozen that wait. A body of layer normalisation over 8192 x 1024 floats that lie in the last level
took an eighth longer without asking.

A loop over rows asks for the rows to come while it writes one (``AHEAD_BYTES``); for loops over elements
there is ``kernels.blocks``.
"""

from __future__ import annotations

from typing import Any

import torch
from numba import types
from numba.extending import intrinsic

from kernels import ir_vectors
from kernels.caches import second_level_bytes

AHEAD_BYTES = 8192
"""Rows to come are asked for this far ahead or more, in whole rows."""


def rows_ahead(out: torch.Tensor, columns: int) -> int:
    """Elements from a row to the one that is asked for; 0 where that would cost more than it saves: what a
    core's second-level cache holds is near enough."""
    row, size = columns * out.element_size(), out.numel() * out.element_size()
    return columns * -(-AHEAD_BYTES // row) if size > second_level_bytes() else 0


def _prefetch(to_write: bool, doc: str) -> Any:
    @intrinsic
    def ask(typing: Any, array: Any, offset: Any) -> Any:
        if not ir_vectors.is_row(array, offset):
            return None

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = ir_vectors.pointer_at(context, builder, signature, args, 0, args[1])
            ir_vectors.prefetch(builder, pointer, to_write)
            return context.get_dummy_value()

        return types.void(array, offset), codegen

    ask.__doc__ = doc
    return ask


prefetch = _prefetch(
    False, "Ask for the cache line of array[offset] in the second level; outside of memory it does nothing."
)
prefetch_to_write = _prefetch(
    True, "Ask for the cache line of array[offset] as this core's own; outside of memory it does nothing."
)
