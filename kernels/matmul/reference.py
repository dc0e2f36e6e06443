"""Quantisation and products in plain torch, right in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def quantize(weight: torch.Tensor, group_size: int, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(integers -levels to levels, scale (out, groups)): a group's largest magnitude becomes ``levels``."""
    groups = weight.float().unflatten(1, (-1, group_size))
    scale = groups.abs().amax(-1) / levels
    integers = (
        torch.where(scale[..., None] > 0, groups / scale[..., None], 0.0).round().clamp(-levels, levels)
    )
    return integers.flatten(1).to(torch.int8), scale


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row has a scale."""
    integers, scale = quantize(weight, max(1, weight.shape[1]), 127)
    return integers, scale[:, 0] if weight.shape[1] else scale.new_zeros(len(weight))


def quantize_int4(weight: torch.Tensor, group_size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Each group has a scale; two integers share a byte, the group's second half in the upper bits."""
    integers, scale = quantize(weight, group_size, 7)
    lower, upper = (integers + 8).to(torch.uint8).unflatten(1, (-1, group_size)).chunk(2, -1)
    return (lower | upper << 4).flatten(1), scale


def unpack_int4(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """The integers of a packed int4 weight (out, in / 2) of ``groups`` groups a row: int8 (out, in)."""
    parts = weight.unflatten(1, (groups, -1)).to(torch.int16)
    return (torch.cat([parts & 15, parts >> 4], -1) - 8).flatten(1).to(torch.int8)


def dequantize_int8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weight that the integers stand for, in the dtype of ``scale``."""
    return weight.to(scale.dtype) * scale[:, None]


def dequantize_int4(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weight that the packed integers stand for, in the dtype of ``scale``."""
    integers = unpack_int4(weight, scale.shape[1]).to(scale.dtype)
    return (integers.unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)


def linear_int8(
    input: torch.Tensor, weight_int8: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """input @ dequantised weight.T + bias."""
    return F.linear(input, dequantize_int8(weight_int8, scale).to(input.dtype), bias)


def linear_int4(
    input: torch.Tensor, weight_int4: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """input @ dequantised weight.T + bias."""
    return F.linear(input, dequantize_int4(weight_int4, scale).to(input.dtype), bias)
