"""Copies, and a pass in place: the limits of what is bound by memory, to stand beside it in the same run."""

from __future__ import annotations

import torch

from kernels.simd import full_width, store_fence, stream_16
from kernels.threads import chunked

_CHUNK = 1 << 14  # elements: a chunk fits the first-level cache and costs more than its counter


@chunked
def _copy(chunk, source, target):
    full_width()
    for j in range(chunk * _CHUNK, min(source.size, (chunk + 1) * _CHUNK)):
        target[j] = source[j]


@chunked
def _streamed_copy(chunk, source, target):
    for j in range(chunk * _CHUNK, min(source.size, (chunk + 1) * _CHUNK) - 15, 16):
        stream_16(target, source, j)
    store_fence()


@chunked
def _rewrite(chunk, source, targets):
    full_width()
    part = source[chunk * _CHUNK : (chunk + 1) * _CHUNK]
    for row in range(targets.shape[0]):
        target = targets[row, chunk * _CHUNK : (chunk + 1) * _CHUNK]
        for j in range(part.size):  # from 0, so that no index may be counted from the end: vectors
            target[j] += part[j]


def copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """target = source, both float32, contiguous and one-dimensional, of the same size."""
    _copy(-(-source.numel() // _CHUNK), source, target)


def streamed_copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """The same past the caches (non-temporal stores), in whole vectors of 16."""
    _streamed_copy(-(-source.numel() // _CHUNK), source, target)


def rewrite(source: torch.Tensor, targets: torch.Tensor) -> None:
    """targets += source, (elements,) and (rows, elements), float32 and contiguous: the source is read once,
    each row read and written where it lies."""
    _rewrite(-(-source.numel() // _CHUNK), source, targets)
