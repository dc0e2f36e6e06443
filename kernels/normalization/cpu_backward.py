"""Layer and root-mean-square normalisation on the CPU, backward.

With n = (x - mean) * rstd and g = grad * weight, the gradients are, by the chain rule,

    grad_input  = rstd * (g - mean(g) - n * mean(g * n))        mean(g) = 0 and mean = 0 without centring
    grad_weight = sum over rows of grad * n
    grad_bias   = sum over rows of grad

Each chunk of rows sums its own row of weight and bias gradients; these partial rows are then added in order.
How many there are depends on the sizes alone, so the result does too.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit

from kernels.fresh_memory import in_huge_pages
from kernels.lanes import load_16, store_16, stream_lanes
from kernels.normalization.cpu import (
    SUM,
    empty_beside,
    inline,
    is_descending,
    parameter,
)
from kernels.prefetching import prefetch, prefetch_to_write, rows_ahead
from kernels.simd import full_width, store_fence
from kernels.storage import narrow, widen
from kernels.streaming import is_streamed
from kernels.threads import chunked, chunks_of

f32 = np.float32


@njit(error_model="numpy", fastmath=False, forceinline=True)  # else numba passes the caller's flags on
def _grad_input(grad, x, weight, mean, rstd, grad_mean, projection):
    # Without contraction: of a single column, grad * weight - grad_mean is zero and must stay it.
    return rstd * (grad * weight - grad_mean - (x - mean) * projection)


@inline
def _grad_weight(total, grad, x, mean, rstd):
    return total + grad * ((x - mean) * rstd)


@chunked(fastmath=SUM)
def backward_rows(
    chunk,
    chunks,
    grad,
    extra,
    x,
    mean,
    rstd,
    weight,
    centred,
    added,
    ahead,
    streamed,
    descending,
    biased,
    grad_input,
    weights,
    biases,
):
    """Rows of the input's gradient, and the chunk's own row of weights and biases; None if not wanted.

    centred, added, biased: whether mean, extra (the gradient of the sum) and biases count. They are asked at
    run time, while None is a body of its own.
    """
    full_width()
    rows, columns = x.shape
    whole = columns - columns % 16
    first, step = (whole - 16, -16) if descending else (0, 16)
    count = f32(columns)
    following, following_grad = x.reshape(x.size), grad.reshape(grad.size)
    if weights is not None:
        weight_row, bias_row = weights[chunk], biases[chunk]
        weight_row[:] = f32(0)
        bias_row[:] = f32(0)
    for i in range(rows * chunk // chunks, rows * (chunk + 1) // chunks):
        row, grad_row, scale = x[i], grad[i], rstd[i]
        middle = mean[i] if centred else f32(0)
        if grad_input is not None:
            written = grad_input.reshape(grad_input.size)
            grad_mean, projection = f32(0), f32(0)
            for j in range(columns):
                weighted = widen(grad_row[j]) * weight[j]
                grad_mean += weighted
                projection += weighted * (widen(row[j]) - middle)
            grad_mean = grad_mean / count if centred else f32(0)
            projection *= scale * scale / count
            extra_row = extra[i]
            out_row = grad_input[i]
        for vector in range(whole // 16):
            j = first + vector * step
            g, v = load_16(grad_row, j), load_16(row, j)
            if ahead:
                prefetch(following, i * columns + j + ahead)
                prefetch(following_grad, i * columns + j + ahead)
            if grad_input is not None:
                w = load_16(weight, j)
                result = _grad_input(g, v, w, middle, scale, grad_mean, projection)
                if added:
                    result = result + load_16(extra_row, j)
                if streamed:
                    stream_lanes(out_row, j, result)
                else:
                    if ahead:
                        prefetch_to_write(written, i * columns + j + ahead)
                    store_16(out_row, j, result)
            if weights is not None:
                store_16(weight_row, j, _grad_weight(load_16(weight_row, j), g, v, middle, scale))
                if biased:
                    store_16(bias_row, j, load_16(bias_row, j) + g)
        for j in range(whole, columns):
            gs, vs = widen(grad_row[j]), widen(row[j])
            if grad_input is not None:
                value = _grad_input(gs, vs, weight[j], middle, scale, grad_mean, projection)
                if added:
                    value += widen(extra_row[j])
                out_row[j] = narrow(value, grad_input)
            if weights is not None:
                weight_row[j] = _grad_weight(weight_row[j], gs, vs, middle, scale)
                if biased:
                    bias_row[j] += gs
    store_fence()


_BLOCK = 256


@chunked
def _sum_rows(block, partial, out):
    """out = the sum of partial's rows, from the first to the last; a block of columns."""
    full_width()
    first, last = block * _BLOCK, min(out.size, (block + 1) * _BLOCK)
    for j in range(first, last):
        out[j] = partial[0, j]
    for k in range(1, len(partial)):
        for j in range(first, last):
            out[j] += partial[k, j]


def _summed(partial: torch.Tensor | None) -> torch.Tensor:
    if partial is None:
        return torch.empty(0, dtype=torch.float32)
    out = torch.empty(partial.shape[1], dtype=torch.float32)
    _sum_rows(-(-out.numel() // _BLOCK), partial, out)
    return out


def backward(
    grad: torch.Tensor,
    grad_sum: torch.Tensor | None,
    input: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    columns: int,
    inputs: bool,
    weighted: bool,
    biased: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """(grad_input, grad_weight, grad_bias) in one pass.

    grad, grad_sum: of the output, and of the sum where there was a residual. grad_input: None unless
    ``inputs``. The parameters' gradients are float32, empty where not asked for.
    """
    grad_input = in_huge_pages(torch.empty_like(input)) if inputs else None
    shape = (rstd.numel(), columns)
    chunks = chunks_of(shape[0], 16, 64)  # few enough partial rows, and short enough sums, both for accuracy
    out = input if grad_input is None else grad_input
    descending = grad_input is not None and is_descending(out, grad, input)
    weights = empty_beside(out, 1024, chunks, columns) if weighted else None
    biases = empty_beside(out, 3072, chunks, columns) if biased else None
    backward_rows(
        chunks,
        chunks,
        (grad, *shape),
        (grad if grad_sum is None else grad_sum, *shape),
        (input, *shape),
        rstd if mean is None else mean,
        rstd,
        (parameter(weight, columns, 1.0, out, -128 if descending else 128), columns),
        mean is not None,
        grad_sum is not None,
        rows_ahead(input, columns),
        grad_input is not None and is_streamed(grad_input, columns),
        descending,
        biased,
        None if grad_input is None else (grad_input, *shape),
        weights,
        biases if biased else weights,
    )
    return grad_input, _summed(weights), _summed(biases)
