"""Softmax on the CPU: three passes over a row that stays in the first-level cache.

Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", section 2 (the safe softmax;
the online form saves a read of memory, which a row in cache does not cost). Large outputs are streamed past
the caches; meanwhile the rows to come are asked for, since between reading one and the next the memory would
idle.
"""

from __future__ import annotations

import numpy as np
import torch

from kernels.fresh_memory import in_huge_pages
from kernels.lanes import load_16, prefetch, stream_lanes
from kernels.simd import exp_nonpositive_float32, full_width, maximum, store_fence
from kernels.storage import narrow, widen
from kernels.streaming import AHEAD_BYTES, is_streamed
from kernels.threads import chunked, chunks_of

f32 = np.float32
_SUM = ("reassoc", "contract", "nsz")


@chunked(fastmath=_SUM)
def _forward(chunk, chunks, x, streamed, out):
    full_width()
    rows, columns = x.shape
    row = np.empty(columns, np.float32)
    following = x.reshape(x.size)
    ahead = (1 + (AHEAD_BYTES - 1) // max(1, columns * x.itemsize)) * columns
    for i in range(rows * chunk // chunks, rows * (chunk + 1) // chunks):
        top = f32(-np.inf)
        for j in range(columns):
            top = maximum(top, widen(x[i, j]))
        total = f32(0)
        for j in range(columns):
            row[j] = exp_nonpositive_float32(widen(x[i, j]) - top)
            total += row[j]
        scale = f32(1) / total
        if streamed:
            out_row = out[i]
            for j in range(0, columns, 16):
                prefetch(following, i * columns + j + ahead)
                stream_lanes(out_row, j, load_16(row, j) * scale)
        else:
            for j in range(columns):
                out[i, j] = narrow(row[j] * scale, out)
    store_fence()


@chunked(fastmath=_SUM)
def _backward(chunk, chunks, grad, out, grad_input):
    full_width()
    rows, columns = out.shape
    for i in range(rows * chunk // chunks, rows * (chunk + 1) // chunks):
        dot = f32(0)
        for j in range(columns):
            dot += widen(grad[i, j]) * widen(out[i, j])
        for j in range(columns):
            grad_input[i, j] = narrow((widen(grad[i, j]) - dot) * widen(out[i, j]), grad_input)


def softmax(input: torch.Tensor) -> torch.Tensor:
    """Softmax along the last dimension of a contiguous tensor."""
    out = in_huge_pages(torch.empty_like(input))
    rows = input.view(-1, input.shape[-1])
    chunks = chunks_of(len(rows), 1 + 8192 // max(1, rows.shape[1]))
    _forward(chunks, chunks, rows, is_streamed(out, rows.shape[1]), out.view(rows.shape))
    return out


def softmax_backward(grad: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """(grad - sum(grad * output)) * output along the last dimension; both contiguous."""
    grad_input = in_huge_pages(torch.empty_like(output))
    rows = output.view(-1, output.shape[-1])
    chunks = chunks_of(len(rows), 1 + 8192 // max(1, rows.shape[1]))
    _backward(chunks, chunks, grad.view(rows.shape), rows, grad_input.view(rows.shape))
    return grad_input
