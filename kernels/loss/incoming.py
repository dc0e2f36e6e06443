"""Gradients that the forward pass has computed, when the backward pass comes for them."""

from __future__ import annotations

from typing import Any

import torch

from kernels.op import register


def _graph_is_kept() -> bool:
    """Could this backward pass run again? Then what it saved must stay as it is."""
    if torch.compiler.is_compiling():
        return True
    # torch's own AOTAutograd asks the same before it reuses a saved tensor's memory.
    known = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return known is None or known()


def times_incoming(kept: torch.Tensor, grad: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """kept * grad (a scalar) in ``dtype``; in the memory of ``kept`` where nobody will ask for it again.

    Whether ``grad`` is one, as it is for a plain ``loss.backward()``, is asked where the data are: on a GPU
    in the kernel, since the host would have to wait.
    """
    if _graph_is_kept() or kept.dtype is not dtype:
        product = (kept * grad).to(dtype)
    else:
        _scale_(kept, grad)
        product = kept
    return once(product)


def once(gradient: torch.Tensor) -> torch.Tensor:
    """The gradient; where autograd records the backward pass, with an error for a second derivative."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradient
    return _Once.apply(gradient, torch.empty(0, requires_grad=True))


class _Once(torch.autograd.Function):
    """The identity. Without it a second derivative would silently be zero."""

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, wakes_autograd: torch.Tensor) -> torch.Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "the losses of kernels have no second derivative; torch.nn.functional.cross_entropy has one"
        )


def _scale_on_cpu(kept: torch.Tensor, factor: torch.Tensor) -> None:
    if factor.item() != 1.0:
        kept.mul_(factor)


_scale_ = register(
    "scale_(Tensor(a!) kept, Tensor factor) -> ()",
    cpu=_scale_on_cpu,
    cuda="kernels.loss.gpu:scale_",
    fake=lambda kept, factor: None,
)
