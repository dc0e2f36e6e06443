"""A KV cache in 8 or 4 bits: a scale for each token and head.

value = integer * scale, symmetric, the largest magnitude of the token's head is 127 (or 7) steps. Source:
Sheng et al. 2023, "FlexGen", section 5 (group-wise); Liu et al. 2024, "KIVI" (which gives keys a scale a
channel instead).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import kernels
from labs.models.gpt import GPT
from labs.precision.compress import sharing

LEVELS = {8: 127, 4: 7}


def quantize(tensor: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 integers, scale (..., 1)) of (..., head_dim)."""
    if bits not in LEVELS:
        raise ValueError(f"bits={bits}: a cache is kept in 4 or 8")
    scale = tensor.abs().amax(-1, keepdim=True).clamp(min=1e-12) / LEVELS[bits]
    return (tensor / scale).round().to(torch.int8), scale


def with_cache_of(model: GPT, bits: int) -> GPT:
    """The model as it computes when every key and value it attends to has been stored in ``bits``."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        key, value = (
            integers * scale for integers, scale in (quantize(tensor, bits) for tensor in (key, value))
        )
        return F.scaled_dot_product_attention(query, key, value, **options)

    made = sharing(model)
    for block in made.blocks:
        block.attention.attend = attend
    return made


class Int8Cache(nn.Module):
    """Keys and values of one token's step, int8, read by the quantised products of ``kernels``.

    Of a sequence and head the keys are a matrix (tokens, dim) with a scale a row: its product with the query
    are the scores. The values lie transposed (dim, tokens): the scale of a token goes into its weight.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """keys, values: (sequences, heads, tokens, dim) float32."""
        super().__init__()
        integers, scale = quantize(keys, 8)
        self.keys, self.key_scale = integers.flatten(0, 1).unbind(), scale[..., 0].flatten(0, 1).unbind()
        integers, scale = quantize(values, 8)
        self.values = integers.transpose(-2, -1).contiguous().flatten(0, 1).unbind()
        self.value_scale = scale[..., 0].flatten(0, 1)
        self.ones = torch.ones(values.shape[-1])

    def attend(self, query: torch.Tensor) -> torch.Tensor:
        """query (sequences, heads, dim) -> the same shape: softmax(query keys^T / sqrt(dim)) values."""
        rows = (query * query.shape[-1] ** -0.5).flatten(0, 1)
        scores = torch.stack(
            [
                kernels.linear_int8(row, keys, scale)
                for row, keys, scale in zip(rows, self.keys, self.key_scale, strict=True)
            ]
        )
        weights = scores.softmax(-1) * self.value_scale
        out = [
            kernels.linear_int8(row, values, self.ones)
            for row, values in zip(weights, self.values, strict=True)
        ]
        return torch.stack(out).view_as(query)
