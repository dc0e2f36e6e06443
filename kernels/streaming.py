"""When an output is stored past the caches: large ones would leave them before anyone reads them.

A plain store first reads the cache line that it overwrites; a streamed one (``kernels.lanes.stream_lanes``)
does not, which saves a third of the traffic where one tensor is read and one written. But what is streamed is
in no cache: whoever reads it next reads memory, and if it lay in a cache before, it must first be put out
there. So what the last level holds is better kept for its reader, and lines of fresh memory are in the caches
already, zeroed.
"""

from __future__ import annotations

import torch

from kernels.caches import last_level_bytes, second_level_bytes
from kernels.cores import usable_cores
from kernels.fresh_memory import is_fresh
from kernels.simd import STREAM_BYTES

LAST_LEVEL_SHARE = 6
"""An operation reads about as much as it writes, and the last level is also other tensors' and, in a virtual
machine, other machines': where it has 480 MB, layer normalisations with a relu between them took 1.9 times as
long with outputs of 16 MB streamed, 1.5 times with 32 MB and as long with 64 MB."""

STREAMED_BYTES = max(2 * usable_cores() * second_level_bytes(), last_level_bytes() // LAST_LEVEL_SHARE)
"""Outputs of at least so many bytes are streamed: a part of the last level, and more than the second-level
caches of the usable cores hold."""


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
