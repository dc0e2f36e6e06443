"""``swiglu``: the gated activation of most language models' feed-forward layers, in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch

from kernels import functional as F
from kernels.activation import cpu_swiglu
from kernels.op import register, use_torch


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (Shazeer 2020, "GLU Variants Improve Transformer").

    gate, up: one shape and dtype, else ValueError; float32, bfloat16 or float16 (others run torch's own).
    The two halves of one projection (``projection.chunk(2, -1)``) are read where they lie.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate and up must have one shape and dtype, not {tuple(gate.shape)} {gate.dtype} "
            f"and {tuple(up.shape)} {up.dtype}"
        )
    if use_torch("swiglu", gate, up):
        return F.silu(gate) * up
    return _swiglu(gate, up)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    gate, up = ctx.saved_tensors
    need_gate, need_up = ctx.needs_input_grad
    if need_gate and need_up:
        return _swiglu_backward(grad, gate, up)
    if need_gate:
        return _swiglu_backward_gate(grad, gate, up), None
    return None, _swiglu(gate, grad)  # silu(gate) * grad is a swiglu


def _like_gate(*tensors: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensors[-1], memory_format=torch.contiguous_format)


_swiglu_backward = register(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    cpu=cpu_swiglu.swiglu_backward,
    cuda="kernels.activation.gpu_swiglu:swiglu_backward",
    fake=lambda grad, gate, up: (_like_gate(up), _like_gate(up)),
)
_swiglu_backward_gate = register(
    "swiglu_backward_gate(Tensor grad, Tensor gate, Tensor up) -> Tensor",
    cpu=cpu_swiglu.swiglu_backward_gate,
    cuda="kernels.activation.gpu_swiglu:swiglu_backward_gate",
    fake=_like_gate,
)
_swiglu = register(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    cpu=cpu_swiglu.swiglu,
    cuda="kernels.activation.gpu_swiglu:swiglu",
    fake=_like_gate,
    setup_context=_keep,
    backward=_backward,
)
