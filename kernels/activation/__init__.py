"""Activations: softmax and functions of one element, with ``torch.nn.functional``'s signatures."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from kernels.activation import cpu_softmax
from kernels.op import register, use_torch


def softmax(
    input: torch.Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """exp(x) / sum(exp(x)) along ``dim``. Shapes, errors and results as ``torch.nn.functional.softmax``.

    input: any shape; float32, bfloat16 or float16 (others run torch's own). dtype: cast to it first.
    """
    if dtype is not None:
        input = input.to(dtype)
    if dim is None or input.dim() == 0 or use_torch("softmax", input):
        return F.softmax(input, dim, _stacklevel + 1)
    if not -input.dim() <= dim < input.dim():
        raise IndexError(
            f"dim={dim} is not an axis of a tensor of {input.dim()} dimensions; the last is {input.dim() - 1}"
        )
    if dim in (-1, input.dim() - 1):
        return _softmax(input.contiguous())
    return _softmax(input.transpose(dim, -1).contiguous()).transpose(dim, -1)


def _keep_output(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(output)


def _backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    (output,) = ctx.saved_tensors
    return _softmax_backward(grad.contiguous(), output)


_softmax_backward = register(
    "softmax_backward(Tensor grad, Tensor output) -> Tensor",
    cpu=cpu_softmax.softmax_backward,
    cuda="kernels.activation.gpu_softmax:softmax_backward",
    fake=lambda grad, output: torch.empty_like(output),
)
_softmax = register(
    "softmax(Tensor input) -> Tensor",
    cpu=cpu_softmax.softmax,
    cuda="kernels.activation.gpu_softmax:softmax",
    fake=torch.empty_like,
    setup_context=_keep_output,
    backward=_backward,
)
