"""Rotary position embedding (Su et al. 2021, "RoFormer", section 3.4)."""

from __future__ import annotations

from typing import Any

import torch

from kernels.op import register, use_torch
from kernels.rotary import cpu
from kernels.rotary.layout import empty_result


def rotary_embedding(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """Each pair of x's coordinates turned by the angle of its position and frequency.

    x: (..., length, dim), for instance (batch, heads, length, dim); cos, sin: (length, dim / 2), in any of
    the dtypes, constants (no gradient). Returns x's shape, dtype and layout in memory; computed in float32.
    Coordinate j is paired with j + dim / 2 (GPT-NeoX, Llama), or 2 j with 2 j + 1 where ``interleaved``
    (GPT-J, RoFormer). The gradient is turned back by the same angles. float32, bfloat16, float16; others run
    torch's own. ValueError where the shapes do not fit.
    """
    if use_torch("rotary_embedding", x, cos, sin):
        _check(x, cos, sin)
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        return eager(wide, cos, sin, interleaved).to(x.dtype)
    _check(x, cos, sin)
    return _rotary(x, cos, sin, interleaved, False)


def eager(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """The same in torch's own operations."""
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    both = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return both.to(x.dtype)


def _check(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    if x.dim() < 2 or x.shape[-1] % 2:
        raise ValueError(f"x must have shape (..., length, dim) with an even dim, not {tuple(x.shape)}")
    wanted = (x.shape[-2], x.shape[-1] // 2)
    if tuple(cos.shape) != wanted or tuple(sin.shape) != wanted:
        raise ValueError(
            f"cos and sin must have shape (length, dim / 2) = {wanted} for x of shape {tuple(x.shape)}, "
            f"not {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError("cos and sin get no gradient here; pass cos.detach() and sin.detach()")


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, cos, sin, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
    cos, sin = ctx.saved_tensors
    return _rotary(grad, cos, sin, ctx.interleaved, not ctx.inverse), None, None, None, None


_rotary = register(
    "rotary_embedding(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor",
    cpu=cpu.rotate,
    cuda="kernels.rotary.gpu:rotate",
    fake=lambda x, cos, sin, interleaved, inverse: empty_result(x),
    setup_context=_keep,
    backward=_backward,
)
