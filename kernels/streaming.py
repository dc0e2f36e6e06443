"""When an output is stored past the caches: large ones would leave them before anyone reads them.

A plain store first reads the cache line that it overwrites; a streamed one (``kernels.lanes.stream_lanes``)
does not, which saves a third of the traffic where one tensor is read and one written. What is small is better
kept for its reader, in the caches next to the cores.
"""

from __future__ import annotations

import torch

from kernels.caches import second_level_bytes, usable_cores
from kernels.simd import STREAM_BYTES

STREAMED_BYTES = 2 * usable_cores() * second_level_bytes()
"""Outputs of at least so many bytes are streamed: of what does not fit the second-level caches, a plain store
fetches each line from the last level or from memory, however large the last level is."""

AHEAD_BYTES = 8192
"""Rows to come are asked for (``kernels.lanes.prefetch``) while one is written, this far ahead or more, in
whole rows: the hardware's own prefetching stops at each page and does nothing between two rows."""


def is_streamed(out: torch.Tensor, columns: int) -> bool:
    """Whether to store past the caches: large outputs whose rows are aligned vectors."""
    row = columns * out.element_size()
    return (
        out.numel() * out.element_size() >= STREAMED_BYTES
        and row % STREAM_BYTES == 0
        and out.data_ptr() % STREAM_BYTES == 0
    )
