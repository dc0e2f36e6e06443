"""Rotary position embedding on the CPU: x is read once and written once, the tables stay in cache."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numba import njit

from kernels.fresh_memory import in_huge_pages
from kernels.prefetching import prefetch, prefetch_to_write
from kernels.rotary.lanes import LANES, rotate_halves, rotate_neighbours
from kernels.rotary.layout import empty_result, four_dimensions, loops_of
from kernels.storage import narrow, widen
from kernels.threads import chunked, chunks_of

f32 = np.float32
_AHEAD = 1024  # elements


@njit(error_model="numpy", forceinline=True)
def _ask(x, out, a, b, o, p):
    """For what lies some rows after x[a] and x[b], which is read, and out[o] and out[p], which is written."""
    prefetch(x, a + _AHEAD)
    prefetch(x, b + _AHEAD)
    prefetch_to_write(out, o + _AHEAD)
    prefetch_to_write(out, p + _AHEAD)


@chunked
def _rotate(chunk, chunks, x, out, cos, sin, sizes, interleaved, sign):
    """Rows are taken in the order of memory: sizes[k] = extent, stride in x, in out and in the tables of
    loop k.
    """
    sign = f32(sign)
    pairs = cos.shape[1]
    whole = pairs - pairs % LANES
    cosines, sines = cos.reshape(cos.size), sin.reshape(sin.size)
    size_1, size_2 = sizes[1, 0], sizes[2, 0]
    x_0, x_1, x_2 = sizes[0, 1], sizes[1, 1], sizes[2, 1]
    out_0, out_1, out_2 = sizes[0, 2], sizes[1, 2], sizes[2, 2]
    angle_0, angle_1, angle_2 = sizes[0, 3], sizes[1, 3], sizes[2, 3]
    rows = sizes[0, 0] * size_1 * size_2
    first, last = rows * chunk // chunks, rows * (chunk + 1) // chunks
    # Divided once: a division for every row of 64 would cost more than the row.
    i, j, k = first // (size_1 * size_2), first // size_2 % size_1, first % size_2 - 1
    for _ in range(first, last):
        k += 1
        if k == size_2:
            k = 0
            j += 1
            if j == size_1:
                j = 0
                i += 1
        start = i * x_0 + j * x_1 + k * x_2
        target = i * out_0 + j * out_1 + k * out_2
        angle = i * angle_0 + j * angle_1 + k * angle_2
        if interleaved:
            for p in range(0, whole, LANES):
                a, o = start + 2 * p, target + 2 * p
                _ask(x, out, a, a + LANES, o, o + LANES)
                rotate_neighbours(x, out, a, a + LANES, o, o + LANES, cosines, sines, angle + p, sign)
        else:
            for p in range(0, whole, LANES):
                a, o = start + p, target + p
                _ask(x, out, a, a + pairs, o, o + pairs)
                rotate_halves(x, out, a, a + pairs, o, o + pairs, cosines, sines, angle + p, sign)
        step, apart = (2, 1) if interleaved else (1, pairs)
        for p in range(whole, pairs):
            a, b = widen(x[start + step * p]), widen(x[start + step * p + apart])
            c, s = widen(cosines[angle + p]), sign * widen(sines[angle + p])
            out[target + step * p] = narrow(a * c - b * s, out)
            out[target + step * p + apart] = narrow(b * c + a * s, out)


def _span(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The memory that the tensor's elements lie in, as one dimension."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor, last + 1


@lru_cache(256)
def _sizes(shape: torch.Size, source: tuple[int, ...], target: tuple[int, ...]) -> torch.Tensor:
    """The loops as the body takes them; kept, since they are the same in each layer and step of a model."""
    return torch.tensor(loops_of(shape, source, target))


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, inverse: bool
) -> torch.Tensor:
    """x (..., length, dim) turned by the angles of cos and sin (length, dim / 2), or back by ``inverse``."""
    out = in_huge_pages(empty_result(x))
    if not out.numel():
        return out
    source, target = four_dimensions(x), four_dimensions(out)
    cos, sin = cos.contiguous(), sin.contiguous()
    rows = out.numel() // out.shape[-1]
    chunks = chunks_of(rows, 1 + 8192 // out.shape[-1])
    sizes = _sizes(source.shape, source.stride(), target.stride())
    sign = -1.0 if inverse else 1.0
    _rotate(chunks, chunks, _span(source), _span(target), cos, sin, sizes, interleaved, sign)
    return out
