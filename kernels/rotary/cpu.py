"""Rotary position embedding on the CPU: x is read once and written once, the tables stay in cache."""

from __future__ import annotations

import numpy as np
import torch

from kernels.rotary.lanes import LANES, rotate_halves, rotate_neighbours
from kernels.rotary.layout import empty_result, four_dimensions, loops_of
from kernels.storage import narrow, widen
from kernels.threads import chunked, chunks_of

f32 = np.float32


@chunked
def _rotate(chunk, chunks, x, out, cos, sin, sizes, interleaved, sign):
    """Rows are taken in the order of memory: sizes[k] = extent, stride in x, in out and in the tables of loop k."""
    sign = f32(sign)
    pairs = cos.shape[1]
    whole = pairs - pairs % LANES
    cosines, sines = cos.reshape(cos.size), sin.reshape(sin.size)
    inner = sizes[1, 0] * sizes[2, 0]
    rows = sizes[0, 0] * inner
    for row in range(rows * chunk // chunks, rows * (chunk + 1) // chunks):
        i, rest = row // inner, row % inner
        j, k = rest // sizes[2, 0], rest % sizes[2, 0]
        start = i * sizes[0, 1] + j * sizes[1, 1] + k * sizes[2, 1]
        target = i * sizes[0, 2] + j * sizes[1, 2] + k * sizes[2, 2]
        angle = i * sizes[0, 3] + j * sizes[1, 3] + k * sizes[2, 3]
        if interleaved:
            for p in range(0, whole, LANES):
                a, o = start + 2 * p, target + 2 * p
                rotate_neighbours(x, out, a, a + LANES, o, o + LANES, cosines, sines, angle + p, sign)
        else:
            for p in range(0, whole, LANES):
                a, o = start + p, target + p
                rotate_halves(x, out, a, a + pairs, o, o + pairs, cosines, sines, angle + p, sign)
        step, apart = (2, 1) if interleaved else (1, pairs)
        for p in range(whole, pairs):
            a, b = widen(x[start + step * p]), widen(x[start + step * p + apart])
            c, s = widen(cosines[angle + p]), sign * widen(sines[angle + p])
            out[target + step * p] = narrow(a * c - b * s, out)
            out[target + step * p + apart] = narrow(b * c + a * s, out)


def _span(tensor: torch.Tensor) -> torch.Tensor:
    """The memory that the tensor's elements lie in, as one dimension."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((last + 1,), (1,))


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, inverse: bool
) -> torch.Tensor:
    """x (..., length, dim) turned by the angles of cos and sin (length, dim / 2), or back by ``inverse``."""
    out = empty_result(x)
    if not out.numel():
        return out
    source, target = four_dimensions(x), four_dimensions(out)
    cos, sin = cos.contiguous(), sin.contiguous()
    rows = out.numel() // out.shape[-1]
    chunks = chunks_of(rows, 1 + 8192 // out.shape[-1])
    sizes = torch.tensor(loops_of(source, target))
    sign = -1.0 if inverse else 1.0
    _rotate(chunks, chunks, _span(source), _span(target), cos, sin, sizes, interleaved, sign)
    return out
