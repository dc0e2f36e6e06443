"""Normalisations as the papers have them. Layer normalisation: Ba, Kiros and Hinton 2016, equations 3 and 4
(over the features of one example); root mean square: Zhang and Sennrich 2019, equation 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimensions."""
    axes = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(axes, keepdim=True)
    output = centred * ((centred * centred).mean(axes, keepdim=True) + eps).rsqrt()
    if weight is not None:
        output = output * weight
    return output if bias is None else output + bias


def rms_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    """x / sqrt(mean(x * x) + eps) * weight; eps None is that of float32."""
    axes = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    output = input * ((input * input).mean(axes, keepdim=True) + eps).rsqrt()
    return output if weight is None else output * weight


def add_layer_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(layer_norm(s), s) of s = input + residual."""
    total = input + residual
    return layer_norm(total, normalized_shape, weight, bias, eps), total


def add_rms_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(s), s) of s = input + residual."""
    total = input + residual
    return rms_norm(total, normalized_shape, weight, eps), total
