"""Activations: softmax and functions of one element, with ``torch.nn.functional``'s signatures.

The elementwise functions take tensors of any shape in float32, bfloat16 and float16, and lay the result out
in memory as torch does. Other dtypes run torch's own function, and so does ``inplace=True``, which has no
fused form.
"""

from __future__ import annotations

from typing import Any

import torch

from kernels import functional as F
from kernels.activation import cpu_softmax
from kernels.activation.elementwise import CALLS
from kernels.activation.swiglu import swiglu
from kernels.op import register, use_torch, warn_once

__all__ = [
    "elu",
    "gelu",
    "leaky_relu",
    "relu",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "swiglu",
    "tanh",
]


def _torch_serves(name: str, input: torch.Tensor, inplace: bool = False) -> bool:
    if inplace:
        if not torch.compiler.is_compiling():
            warn_once(name, "inplace=True has no fused form")
        return True
    return not isinstance(input, torch.Tensor) or use_torch(name, input)


def gelu(input: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """x Phi(x), Phi the standard normal distribution; ``approximate="tanh"``: the form of BERT and GPT-2."""
    name = "gelu_tanh" if approximate == "tanh" else "gelu"
    if _torch_serves(name, input) or approximate not in ("none", "tanh"):
        return F.gelu(input, approximate=approximate)
    return CALLS[name](input)


def silu(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """x sigmoid(x)."""
    return F.silu(input, inplace) if _torch_serves("silu", input, inplace) else CALLS["silu"](input)


def sigmoid(input: torch.Tensor) -> torch.Tensor:
    """1 / (1 + e**-x)."""
    return F.sigmoid(input) if _torch_serves("sigmoid", input) else CALLS["sigmoid"](input)


def tanh(input: torch.Tensor) -> torch.Tensor:
    """The hyperbolic tangent."""
    return F.tanh(input) if _torch_serves("tanh", input) else CALLS["tanh"](input)


def relu(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """max(x, 0)."""
    return F.relu(input, inplace) if _torch_serves("relu", input, inplace) else CALLS["relu"](input)


def leaky_relu(input: torch.Tensor, negative_slope: float = 0.01, inplace: bool = False) -> torch.Tensor:
    """x above 0, ``negative_slope`` x below."""
    if _torch_serves("leaky_relu", input, inplace):
        return F.leaky_relu(input, negative_slope, inplace)
    return CALLS["leaky_relu"](input, float(negative_slope))


def softplus(input: torch.Tensor, beta: float = 1, threshold: float = 20) -> torch.Tensor:
    """ln(1 + e**(beta x)) / beta, and x itself where beta x > ``threshold``."""
    if _torch_serves("softplus", input):
        return F.softplus(input, beta, threshold)
    return CALLS["softplus"](input, float(beta), float(threshold))


def elu(input: torch.Tensor, alpha: float = 1.0, inplace: bool = False) -> torch.Tensor:
    """x above 0, alpha (e**x - 1) below."""
    if _torch_serves("elu", input, inplace):
        return F.elu(input, alpha, inplace)
    return CALLS["elu"](input, float(alpha))


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
