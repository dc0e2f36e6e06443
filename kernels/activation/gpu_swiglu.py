"""swiglu on the GPU: gate, up and the gradients each cross memory once."""

# Triton declares constants by annotation, and types nothing else.
# mypy: allow-incomplete-defs

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from kernels.activation.gpu_elementwise import FORMULAS, configuration
from kernels.activation.layout import rows_of

if TYPE_CHECKING:
    from kernels.ahead_of_time import Compilation

_silu = FORMULAS["silu"]
_silu_gradient = FORMULAS["silu_gradient"]


@triton.jit
def _forward(gate, gate_stride, up, up_stride, out, columns, blocks, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offsets = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    g = tl.load(gate + row * gate_stride + offsets, mask=inside).to(tl.float32)
    u = tl.load(up + row * up_stride + offsets, mask=inside).to(tl.float32)
    tl.store(out + row * columns + offsets, (_silu(g) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad,
    grad_stride,
    gate,
    gate_stride,
    up,
    up_stride,
    grad_gate,
    grad_up,
    columns,
    blocks,
    BOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offsets = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    d = tl.load(grad + row * grad_stride + offsets, mask=inside).to(tl.float32)
    g = tl.load(gate + row * gate_stride + offsets, mask=inside).to(tl.float32)
    u = tl.load(up + row * up_stride + offsets, mask=inside).to(tl.float32)
    element = grad_gate.dtype.element_ty
    tl.store(grad_gate + row * columns + offsets, _silu_gradient(d * u, g).to(element), mask=inside)
    if BOTH:
        tl.store(grad_up + row * columns + offsets, (_silu(g) * d).to(element), mask=inside)


def _launch(kernel: Any, read: list[torch.Tensor], written: list[Any], **constants: Any) -> None:
    total = read[0].numel()
    if total == 0:
        return
    # Contiguous tensors are one long row.
    columns = total if all(tensor.is_contiguous() for tensor in read) else read[0].shape[-1]
    block, options = configuration(read[0].element_size())
    blocks = triton.cdiv(columns, block["BLOCK"])
    rows = [part for tensor in read for part in rows_of(tensor, columns)]
    kernel[(total // columns * blocks,)](*rows, *written, columns, blocks, **constants, **block, **options)


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up; contiguous."""
    out = _empty(up)
    _launch(_forward, [gate, up], [out])
    return out


def swiglu_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up in one pass."""
    grad_gate, grad_up = _empty(up), _empty(up)
    _launch(_backward, [grad, gate, up], [grad_gate, grad_up], BOTH=True)
    return grad_gate, grad_up


def swiglu_backward_gate(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The gradient of gate alone."""
    grad_gate = _empty(up)
    _launch(_backward, [grad, gate, up], [grad_gate, grad_gate], BOTH=False)
    return grad_gate


def compilations() -> list[Compilation]:
    """Two halves of a bfloat16 projection, and its gradients."""
    from kernels.ahead_of_time import Compilation

    constants, options = configuration(2)
    sizes = {"columns": "i32!", "blocks": "i32"}

    def types(*names: str) -> dict[str, str]:
        return {n: "i32!" if n.endswith("stride") else "*bf16!" for n in names} | sizes

    read = ("gate", "gate_stride", "up", "up_stride")
    written = ("grad_gate", "grad_up")
    return [
        Compilation(
            "swiglu forward bf16", _forward, types(*read, "out"), constants, options, "swiglu", "forward"
        ),
        Compilation(
            "swiglu backward bf16",
            _backward,
            types("grad", "grad_stride", *read, *written),
            {"BOTH": True, **constants},
            options,
            "swiglu",
            "backward",
        ),
    ]
