"""Loops over the elements of vectors, cut into blocks: between two of them there is time to ask ahead.

LLVM vectorises no loop that asks for cache lines or stores past the caches, and a formula is best left to its
vectoriser. So a chunk of elements is computed in blocks, each in its place or, to be streamed past the
caches, in one that stays in the first level:

    for at in range(0, out.size, BLOCK):
        read_ahead(x, at)
        if streamed:
            part = staged[: x[at : at + BLOCK].size]
            formula(x[at : at + BLOCK], part)
            stream(part, out, at)
        else:
            write_ahead(out, at)
            formula(x[at : at + BLOCK], out[at : at + BLOCK])

Not with one place for both, ``staged`` or a part of ``out``: numba would count references at each block.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from kernels.lanes import LANES, load_16, stream_lanes
from kernels.prefetching import prefetch, prefetch_to_write

BLOCK = 128
"""Elements between two looks ahead: four times as many wait for a third of their lines after all."""
_AHEAD = 512  # elements from a block to the one that is asked for
_LINE_BYTES = 64
LINE = 32
"""Elements of whole cache lines in any dtype."""

_inline = njit(error_model="numpy", forceinline=True)


@_inline
def part_of(size: Any, chunk: Any, chunks: Any) -> Any:
    """(first, end) of a chunk's elements, in whole cache lines of any dtype but for the last chunk."""
    first, end = size * chunk // chunks, size * (chunk + 1) // chunks
    return first // LINE * LINE, size if chunk == chunks - 1 else end // LINE * LINE


@_inline
def read_ahead(array: Any, at: Any) -> None:
    """Ask for a block that will be read, some blocks after the one at ``at``."""
    for line in range(0, BLOCK, _LINE_BYTES // array.itemsize):
        prefetch(array, at + _AHEAD + line)


@_inline
def write_ahead(array: Any, at: Any) -> None:
    """Ask for a block that will be written, some blocks after the one at ``at``."""
    for line in range(0, BLOCK, _LINE_BYTES // array.itemsize):
        prefetch_to_write(array, at + _AHEAD + line)


@_inline
def stream(part: Any, out: Any, at: Any) -> None:
    """out[at:] = part, past the caches; ``kernels.simd.store_fence()`` after the last."""
    whole = part.size - part.size % LANES
    for j in range(0, whole, LANES):
        stream_lanes(out, at + j, load_16(part, j))
    for j in range(whole, part.size):
        out[at + j] = part[j]
