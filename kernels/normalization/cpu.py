"""Layer and root-mean-square normalisation on the CPU, forward: each row crosses memory once.

One body serves both norms, with and without a residual. A row is read twice: for its statistics, from memory,
and for the output, from the first-level cache. Large outputs are streamed past the caches, and meanwhile the
rows to come are asked for.

Mean and variance come from one pass over x - s, with s the mean of the row's first elements: variance =
mean((x - s)**2) - (mean - s)**2 (Chan, Golub and LeVeque 1983, "Algorithms for computing the sample
variance", section 2, shifted data). It is as accurate as two passes while (mean - s)**2 is small beside the
variance; a row where it is not gets a second pass. Statistics are float32, whatever the input is.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit

from kernels.fresh_memory import in_huge_pages
from kernels.lanes import load_16, store_16, stream_lanes
from kernels.prefetching import prefetch, prefetch_to_write, rows_ahead
from kernels.simd import full_width, store_fence
from kernels.storage import narrow, widen
from kernels.streaming import is_large, is_streamed
from kernels.threads import chunked, chunks_of

f32 = np.float32
SUM = ("reassoc", "contract", "nsz")
inline = njit(error_model="numpy", fastmath={"contract"}, forceinline=True)


@inline
def _output(x, mean, rstd, weight, bias):
    return (x - mean) * rstd * weight + bias


@chunked(fastmath=SUM)
def forward_rows(
    chunk,
    chunks,
    x,
    residual,
    weight,
    bias,
    eps,
    centred,
    added,
    ahead,
    streamed,
    descending,
    out,
    total,
    mean,
    rstd,
):
    """Rows of x (or of x + residual, kept in total) normalised into out; centred: with a mean, kept too.
    ahead: elements to the row that is asked for, or 0."""
    full_width()
    rows, columns = x.shape
    whole = columns - columns % 16
    first, step = (whole - 16, -16) if descending else (0, 16)
    count = f32(columns)
    head = min(64, columns)
    staged = np.empty(columns if added else 0, x.dtype)
    following, following_residual = x.reshape(x.size), residual.reshape(residual.size)
    written, written_total = out.reshape(out.size), total.reshape(total.size)
    for i in range(rows * chunk // chunks, rows * (chunk + 1) // chunks):
        row = x[i]
        if added:
            for j in range(columns):
                staged[j] = narrow(widen(x[i, j]) + widen(residual[i, j]), staged)
            row = staged
        shift = f32(0)
        if centred:
            for j in range(head):
                shift += widen(row[j])
            shift /= f32(head)
        offset, square = f32(0), f32(0)
        for j in range(columns):
            distance = widen(row[j]) - shift
            offset += distance
            square += distance * distance
        middle, variance = f32(0), square / count
        if centred:
            offset /= count
            middle = shift + offset
            variance -= offset * offset
            if offset * offset > f32(1 / 16) * variance:
                offset, square = f32(0), f32(0)
                for j in range(columns):
                    distance = widen(row[j]) - middle
                    offset += distance
                    square += distance * distance
                offset /= count
                middle += offset
                variance = square / count - offset * offset
            mean[i] = middle
        scale = f32(f32(1) / math.sqrt(variance + f32(eps)))
        rstd[i] = scale
        out_row = out[i]
        for vector in range(whole // 16):
            j = first + vector * step
            result = _output(load_16(row, j), middle, scale, load_16(weight, j), load_16(bias, j))
            if ahead:
                prefetch(following, i * columns + j + ahead)
                if added:
                    prefetch(following_residual, i * columns + j + ahead)
                if not streamed:
                    prefetch_to_write(written, i * columns + j + ahead)
            if streamed:
                stream_lanes(out_row, j, result)
            else:
                store_16(out_row, j, result)
        for j in range(whole, columns):
            out_row[j] = narrow(_output(widen(row[j]), middle, scale, weight[j], bias[j]), out)
        if added:
            total_row = total[i]
            for j in range(0, whole, 16):
                if streamed:
                    stream_lanes(total_row, j, load_16(row, j))
                else:
                    if ahead:
                        prefetch_to_write(written_total, i * columns + j + ahead)
                    store_16(total_row, j, load_16(row, j))
            for j in range(whole, columns):
                total_row[j] = row[j]
    store_fence()


PAGE_BYTES = 4096


def is_descending(out: torch.Tensor, *inputs: torch.Tensor) -> bool:
    """Whether rows of ``out`` are better stored from their ends.

    A load waits for an earlier store at the same place within a page of 4 KiB, though the pages differ.
    malloc puts equal tensors 64 bytes apart, so that going up each load would follow such a
    store.
    """
    ahead = min((out.data_ptr() - value.data_ptr()) % PAGE_BYTES or PAGE_BYTES for value in inputs)
    behind = min((value.data_ptr() - out.data_ptr()) % PAGE_BYTES or PAGE_BYTES for value in inputs)
    return ahead < behind


def empty_beside(out: torch.Tensor, distance: int, *shape: int) -> torch.Tensor:
    """New float32 memory whose place within a page is ``distance`` bytes from that of ``out``."""
    memory = torch.empty(math.prod(shape) + PAGE_BYTES // 4, dtype=torch.float32)
    start = (out.data_ptr() + distance - memory.data_ptr()) % PAGE_BYTES // 4
    return memory[start : start + math.prod(shape)].view(shape)


def parameter(
    value: torch.Tensor | None, columns: int, otherwise: float, out: torch.Tensor, distance: int
) -> torch.Tensor:
    """The parameter as a float32 vector, constant where there is none.

    Beside a large ``out`` it is copied to where no store delays its loads; elsewhere the copy costs more.
    """
    if not is_large(out):
        if value is None:
            return torch.full((columns,), otherwise, dtype=torch.float32)
        as_it_is = value.dtype is torch.float32 and value.is_contiguous()
        return value if as_it_is else value.reshape(columns).float().contiguous()
    placed = empty_beside(out, distance, columns)
    return placed.fill_(otherwise) if value is None else placed.copy_(value.reshape(columns))


def forward(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    columns: int,
    eps: float,
    centred: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(output, sum, mean, rstd) over the last ``columns`` elements of a contiguous tensor.

    What is not asked for (the sum without a residual, the mean unless ``centred``) repeats another: the body
    has no variant for it.
    """
    out = in_huge_pages(torch.empty_like(input))
    total = in_huge_pages(torch.empty_like(input)) if residual is not None else out
    shape = (input.numel() // columns, columns)
    rstd = torch.empty(shape[0], dtype=torch.float32)
    mean = torch.empty_like(rstd) if centred else rstd
    descending = is_descending(out, input)
    step = -128 if descending else 128
    weights = parameter(weight, columns, 1.0, out, step)
    biases = parameter(bias, columns, 0.0, out, 2 * step)
    chunks = chunks_of(shape[0], 1 + 8192 // columns)
    forward_rows(
        chunks,
        chunks,
        (input, *shape),
        (input if residual is None else residual, *shape),
        (weights, columns),
        (biases, columns),
        eps,
        centred,
        residual is not None,
        rows_ahead(out, columns),
        is_streamed(out, columns) and is_streamed(total, columns),
        descending,
        (out, *shape),
        (total, *shape),
        mean,
        rstd,
    )
    return out, total, mean, rstd
