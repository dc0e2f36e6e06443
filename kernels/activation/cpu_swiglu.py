"""swiglu on the CPU: gate, up and the gradients each cross memory once."""

from __future__ import annotations

import torch

from kernels.activation.cpu_elementwise import FORMULAS, LEAST
from kernels.activation.layout import rows_of
from kernels.simd import full_width
from kernels.storage import narrow, widen
from kernels.threads import chunked, chunks_of

_sigmoid, _silu, _silu_gradient = FORMULAS["sigmoid"], FORMULAS["silu"], FORMULAS["silu_gradient"]


@chunked
def _forward(chunk, chunks, gate, gate_stride, up, up_stride, out, rows, columns):
    full_width()
    # One row: its columns are shared out. Several: the rows are.
    for i in range(
        rows * chunk // chunks if rows > 1 else 0, rows * (chunk + 1) // chunks if rows > 1 else 1
    ):
        low, high = (0, columns) if rows > 1 else (columns * chunk // chunks, columns * (chunk + 1) // chunks)
        g, u, o = gate[i * gate_stride :], up[i * up_stride :], out[i * columns :]
        for j in range(low, high):
            o[j] = narrow(_silu(widen(g[j])) * widen(u[j]), out)


@chunked
def _backward(
    chunk, chunks, grad, grad_stride, gate, gate_stride, up, up_stride, grad_gate, grad_up, rows, columns
):
    """``grad_up`` is None where it is not wanted."""
    full_width()
    for i in range(
        rows * chunk // chunks if rows > 1 else 0, rows * (chunk + 1) // chunks if rows > 1 else 1
    ):
        low, high = (0, columns) if rows > 1 else (columns * chunk // chunks, columns * (chunk + 1) // chunks)
        d, g, u = grad[i * grad_stride :], gate[i * gate_stride :], up[i * up_stride :]
        for j in range(low, high):
            x = widen(g[j])
            grad_gate[i * columns + j] = narrow(_silu_gradient(widen(d[j]) * widen(u[j]), x), grad_gate)
            if grad_up is not None:
                grad_up[i * columns + j] = narrow(_silu(x) * widen(d[j]), grad_up)


def _shape(*tensors: torch.Tensor) -> tuple[int, int, int]:
    """(rows, columns, chunks): one long row where every tensor is contiguous."""
    total = tensors[0].numel()
    if all(tensor.is_contiguous() for tensor in tensors):
        return 1, total, chunks_of(total, LEAST)
    columns = max(1, tensors[0].shape[-1])
    return total // columns, columns, chunks_of(total // columns, 1 + LEAST // columns)


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up; contiguous."""
    out = _empty(up)
    rows, columns, chunks = _shape(gate, up)
    if out.numel():
        _forward(chunks, chunks, *rows_of(gate, columns), *rows_of(up, columns), out.view(-1), rows, columns)
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
