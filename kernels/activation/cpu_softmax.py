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
from kernels.lanes import load_16, store_16, stream_lanes
from kernels.prefetching import prefetch, prefetch_to_write, rows_ahead
from kernels.simd import exp_nonpositive_float32, full_width, maximum, store_fence
from kernels.storage import narrow, widen
from kernels.streaming import is_streamed
from kernels.threads import chunked, chunks_of

f32 = np.float32
_SUM = ("reassoc", "contract", "nsz")


@chunked(fastmath=_SUM)
def _forward(chunk, chunks, x, ahead, streamed, out):
    full_width()
    rows, columns = x.shape
    row = np.empty(columns, np.float32)
    whole = columns - columns % 16
    following, written = x.reshape(x.size), out.reshape(out.size)
    for i in range(rows * chunk // chunks, rows * (chunk + 1) // chunks):
        top = f32(-np.inf)
        for j in range(columns):
            top = maximum(top, widen(x[i, j]))
        total = f32(0)
        for j in range(columns):
            row[j] = exp_nonpositive_float32(widen(x[i, j]) - top)
            total += row[j]
        scale = f32(1) / total
        out_row = out[i]
        for j in range(0, whole, 16):
            if ahead:
                prefetch(following, i * columns + j + ahead)
                if not streamed:
                    prefetch_to_write(written, i * columns + j + ahead)
            if streamed:
                stream_lanes(out_row, j, load_16(row, j) * scale)
            else:
                store_16(out_row, j, load_16(row, j) * scale)
        for j in range(whole, columns):
            out_row[j] = narrow(row[j] * scale, out)
    store_fence()


@chunked(fastmath=_SUM)
def _backward(chunk, chunks, grad, out, ahead, grad_input):
    full_width()
    rows, columns = out.shape
    whole = columns - columns % 16
    following, following_grad, written = (
        out.reshape(out.size),
        grad.reshape(out.size),
        grad_input.reshape(out.size),
    )
    for i in range(rows * chunk // chunks, rows * (chunk + 1) // chunks):
        dot = f32(0)
        for j in range(columns):
            dot += widen(grad[i, j]) * widen(out[i, j])
        grad_row, out_row, grad_input_row = grad[i], out[i], grad_input[i]
        for j in range(0, whole, 16):
            if ahead:
                prefetch(following, i * columns + j + ahead)
                prefetch(following_grad, i * columns + j + ahead)
                prefetch_to_write(written, i * columns + j + ahead)
            store_16(grad_input_row, j, (load_16(grad_row, j) - dot) * load_16(out_row, j))
        for j in range(whole, columns):
            grad_input_row[j] = narrow((widen(grad_row[j]) - dot) * widen(out_row[j]), grad_input)


def _rows(tensor: torch.Tensor) -> tuple[int, int]:
    columns = tensor.shape[-1]
    return tensor.numel() // max(1, columns), columns


def softmax(input: torch.Tensor) -> torch.Tensor:
    """Softmax along the last dimension of a contiguous tensor."""
    out = in_huge_pages(torch.empty_like(input))
    rows, columns = _rows(input)
    chunks = chunks_of(rows, 1 + 8192 // max(1, columns))
    how = rows_ahead(out, columns), is_streamed(out, columns)
    _forward(chunks, chunks, (input, rows, columns), *how, (out, rows, columns))
    return out


def softmax_backward(grad: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """(grad - sum(grad * output)) * output along the last dimension; both contiguous."""
    grad_input = in_huge_pages(torch.empty_like(output))
    rows, columns = _rows(output)
    chunks = chunks_of(rows, 1 + 8192 // max(1, columns))
    read = (grad, rows, columns), (output, rows, columns)
    _backward(chunks, chunks, *read, rows_ahead(output, columns), (grad_input, rows, columns))
    return grad_input
