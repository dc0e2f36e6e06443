"""swiglu on the CPU: gate, up and the gradients each cross memory once."""

from __future__ import annotations

import numpy as np
import torch

from kernels.activation.cpu_elementwise import FORMULAS, LEAST, inline
from kernels.activation.layout import rows_of
from kernels.blocks import BLOCK, LINE, part_of, read_ahead, stream, write_ahead
from kernels.fresh_memory import in_huge_pages
from kernels.simd import full_width, store_fence
from kernels.storage import narrow, widen
from kernels.streaming import is_streamed
from kernels.threads import chunked, chunks_of

_silu, _silu_gradient = FORMULAS["silu"], FORMULAS["silu_gradient"]


@inline
def _product(g, u, out):
    full_width()
    for j in range(out.size):
        out[j] = narrow(_silu(widen(g[j])) * widen(u[j]), out)


@inline
def _gate_gradient(d, g, u, grad_gate):
    full_width()
    for j in range(grad_gate.size):
        grad_gate[j] = narrow(_silu_gradient(widen(d[j]) * widen(u[j]), widen(g[j])), grad_gate)


@inline
def _gradients(d, g, u, grad_gate, grad_up):
    full_width()
    for j in range(grad_gate.size):
        x = widen(g[j])
        grad_gate[j] = narrow(_silu_gradient(widen(d[j]) * widen(u[j]), x), grad_gate)
        grad_up[j] = narrow(_silu(x) * widen(d[j]), grad_up)


@chunked
def _forward(chunk, chunks, gate, gate_stride, up, up_stride, streamed, out, rows, columns):
    full_width()
    staged = np.empty(BLOCK, out.dtype)
    # One row: its columns are shared out. Several: the rows are.
    first, last = (rows * chunk // chunks, rows * (chunk + 1) // chunks) if rows > 1 else (0, 1)
    low, high = part_of(columns, chunk, chunks) if rows == 1 else (0, columns)
    for i in range(first, last):
        g = gate[i * gate_stride + low : i * gate_stride + high]
        u = up[i * up_stride + low : i * up_stride + high]
        o = out[i * columns + low : i * columns + high]
        for at in range(0, o.size, BLOCK):
            read_ahead(g, at)
            read_ahead(u, at)
            gs, us = g[at : at + BLOCK], u[at : at + BLOCK]
            if streamed:
                part = staged[: gs.size]
                _product(gs, us, part)
                stream(part, o, at)
            else:
                write_ahead(o, at)
                _product(gs, us, o[at : at + BLOCK])
    store_fence()


@chunked
def _backward(
    chunk,
    chunks,
    grad,
    grad_stride,
    gate,
    gate_stride,
    up,
    up_stride,
    streamed,
    grad_gate,
    grad_up,
    rows,
    columns,
):
    """``grad_up`` is None where it is not wanted."""
    full_width()
    staged, staged_up = np.empty(BLOCK, grad_gate.dtype), np.empty(BLOCK, grad_gate.dtype)
    first, last = (rows * chunk // chunks, rows * (chunk + 1) // chunks) if rows > 1 else (0, 1)
    low, high = part_of(columns, chunk, chunks) if rows == 1 else (0, columns)
    for i in range(first, last):
        d = grad[i * grad_stride + low : i * grad_stride + high]
        g = gate[i * gate_stride + low : i * gate_stride + high]
        u = up[i * up_stride + low : i * up_stride + high]
        o = grad_gate[i * columns + low : i * columns + high]
        for at in range(0, o.size, BLOCK):
            read_ahead(d, at)
            read_ahead(g, at)
            read_ahead(u, at)
            ds, gs, us = d[at : at + BLOCK], g[at : at + BLOCK], u[at : at + BLOCK]
            if grad_up is None:
                if streamed:
                    part = staged[: gs.size]
                    _gate_gradient(ds, gs, us, part)
                    stream(part, o, at)
                else:
                    write_ahead(o, at)
                    _gate_gradient(ds, gs, us, o[at : at + BLOCK])
            else:
                p = grad_up[i * columns + low : i * columns + high]
                if streamed:
                    part, part_up = staged[: gs.size], staged_up[: gs.size]
                    _gradients(ds, gs, us, part, part_up)
                    stream(part, o, at)
                    stream(part_up, p, at)
                else:
                    write_ahead(o, at)
                    write_ahead(p, at)
                    _gradients(ds, gs, us, o[at : at + BLOCK], p[at : at + BLOCK])
    store_fence()


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
        streamed = is_streamed(out, LINE if rows == 1 else columns)
        read = *rows_of(gate, columns), *rows_of(up, columns)
        _forward(chunks, chunks, *read, streamed, (out, out.numel()), rows, columns)
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
    size = grad_gate.numel()
    written = [(grad_gate, size), None if grad_up is None else (grad_up, size)]
    made = [tensor for tensor in (grad_gate, grad_up) if tensor is not None]
    streamed = all(is_streamed(tensor, LINE if rows == 1 else columns) for tensor in made)
    _backward(chunks, chunks, *read, streamed, *written, rows, columns)
