"""When an output is stored past the caches: large ones would leave them before anyone reads them.

A plain store first reads the cache line that it overwrites; a streamed one (``kernels.lanes.stream_lanes``)
does not, which saves a third of the traffic where one tensor is read and one written. What is small is better
kept for its reader, in the caches next to the cores; and lines of fresh memory are in them, zeroed.
"""

from __future__ import annotations

import torch

from kernels.caches import second_level_bytes
from kernels.cores import usable_cores
from kernels.fresh_memory import is_fresh
from kernels.simd import STREAM_BYTES

STREAMED_BYTES = 2 * usable_cores() * second_level_bytes()
"""Outputs of at least so many bytes are streamed: twice what the second-level caches of the usable cores
hold, so that a reader would find less than half there. Of the rest a plain store fetches each line from the
last level or from memory, however large the last level is."""

AHEAD_BYTES = 8192
"""Rows to come are asked for (``kernels.lanes.prefetch``) while one is written, this far ahead or more, in
whole rows: the hardware's own prefetching stops at each page and does nothing between two rows."""


def is_large(out: torch.Tensor) -> bool:
    """Whether most of an output would leave the caches before anyone reads it."""
    return out.numel() * out.element_size() >= STREAMED_BYTES


def goes_past(out: torch.Tensor) -> bool:
    """Whether what is stored is better not kept: large outputs, in memory that has been written before."""
    return is_large(out) and not is_fresh(out)


def is_streamed(out: torch.Tensor, columns: int) -> bool:
    """Whether to store past the caches: what goes past them, and its rows are aligned vectors."""
    row = columns * out.element_size()
    return row % STREAM_BYTES == 0 and out.data_ptr() % STREAM_BYTES == 0 and goes_past(out)
