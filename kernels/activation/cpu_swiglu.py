"""swiglu on the CPU: gate, up and the gradients each cross memory once."""

from __future__ import annotations

import numpy as np
import torch

from kernels.activation.cpu_elementwise import FORMULAS, LEAST, inline
from kernels.activation.layout import rows_of
from kernels.fresh_memory import in_huge_pages
from kernels.lanes import load_16, stream_lanes
from kernels.simd import full_width, store_fence
from kernels.storage import narrow, widen
from kernels.streaming import is_streamed
from kernels.threads import chunked, chunks_of

_silu, _silu_gradient = FORMULAS["silu"], FORMULAS["silu_gradient"]


_STAGED = 512  # elements that wait in the first-level cache to be streamed


@inline
def _range(size, chunk, chunks):
    return size * chunk // chunks, size * (chunk + 1) // chunks


@inline
def _columns(size, chunk, chunks):
    """A chunk's part of one row, from whole vectors to whole vectors, so that stores stay aligned."""
    low, high = _range(size, chunk, chunks)
    return low // 16 * 16, size if chunk == chunks - 1 else high // 16 * 16


@inline
def _product(g, u, out):
    """out = silu(g) * u, of rows."""
    for j in range(g.size):
        out[j] = narrow(_silu(widen(g[j])) * widen(u[j]), out)


@chunked
def _forward(chunk, chunks, gate, gate_stride, up, up_stride, streamed, out, rows, columns):
    full_width()
    staged = np.empty(_STAGED, out.dtype)
    # One row: its columns are shared out. Several: the rows are.
    first, last = _range(rows, chunk, chunks) if rows > 1 else (0, 1)
    low, high = _columns(columns, chunk, chunks) if rows == 1 else (0, columns)
    for i in range(first, last):
        g = gate[i * gate_stride + low : i * gate_stride + high]
        u = up[i * up_stride + low : i * up_stride + high]
        o = out[i * columns + low : i * columns + high]
        if not streamed:
            _product(g, u, o)
            continue
        for start in range(0, g.size, _STAGED):
            stop = min(start + _STAGED, g.size)
            part = staged[: stop - start]
            _product(g[start:stop], u[start:stop], part)
            whole = part.size - part.size % 16
            for j in range(0, whole, 16):
                stream_lanes(o, start + j, load_16(part, j))
            for j in range(whole, part.size):
                o[start + j] = part[j]
    store_fence()


@chunked
def _backward(
    chunk, chunks, grad, grad_stride, gate, gate_stride, up, up_stride, grad_gate, grad_up, rows, columns
):
    """``grad_up`` is None where it is not wanted."""
    full_width()
    first, last = _range(rows, chunk, chunks) if rows > 1 else (0, 1)
    low, high = _range(columns, chunk, chunks) if rows == 1 else (0, columns)
    for i in range(first, last):
        d = grad[i * grad_stride + low : i * grad_stride + high]
        g = gate[i * gate_stride + low : i * gate_stride + high]
        u = up[i * up_stride + low : i * up_stride + high]
        o = grad_gate[i * columns + low : i * columns + high]
        if grad_up is None:
            for j in range(g.size):
                o[j] = narrow(_silu_gradient(widen(d[j]) * widen(u[j]), widen(g[j])), grad_gate)
        else:
            p = grad_up[i * columns + low : i * columns + high]
            for j in range(g.size):
                x = widen(g[j])
                o[j] = narrow(_silu_gradient(widen(d[j]) * widen(u[j]), x), grad_gate)
                p[j] = narrow(_silu(x) * widen(d[j]), grad_up)


def _shape(*tensors: torch.Tensor) -> tuple[int, int, int]:
    """(rows, columns, chunks): one long row where every tensor is contiguous."""
    total = tensors[0].numel()
    if all(tensor.is_contiguous() for tensor in tensors):
        return 1, total, chunks_of(total, LEAST)
    columns = max(1, tensors[0].shape[-1])
    return total // columns, columns, chunks_of(total // columns, 1 + LEAST // columns)


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    return in_huge_pages(torch.empty_like(tensor, memory_format=torch.contiguous_format))


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up; contiguous."""
    out = _empty(up)
    rows, columns, chunks = _shape(gate, up)
    if out.numel():
        streamed = is_streamed(out, 32 if rows == 1 else columns)  # one row is cut at vectors
        read = *rows_of(gate, columns), *rows_of(up, columns)
        _forward(chunks, chunks, *read, streamed, out.view(-1), rows, columns)
    return out


def swiglu_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up in one pass."""
    grad_gate, grad_up = _empty(up), _empty(up)
    _run_backward(grad, gate, up, grad_gate, grad_up)
    return grad_gate, grad_up


def swiglu_backward_gate(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The gradient of gate alone."""
    grad_gate = _empty(up)
    _run_backward(grad, gate, up, grad_gate, None)
    return grad_gate


def _run_backward(
    grad: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    grad_gate: torch.Tensor,
    grad_up: torch.Tensor | None,
) -> None:
    rows, columns, chunks = _shape(grad, gate, up)
    if not grad.numel():
        return
    read = [part for tensor in (grad, gate, up) for part in rows_of(tensor, columns)]
    written = [grad_gate.view(-1), None if grad_up is None else grad_up.view(-1)]
    _backward(chunks, chunks, *read, *written, rows, columns)
