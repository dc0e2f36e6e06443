"""A KV cache in 8 or 4 bits: a scale for each token and head.

value = integer * scale, symmetric, the largest magnitude of the token's head is 127 (or 7) steps. Source:
Sheng et al. 2023, "FlexGen", section 5 (group-wise); Liu et al. 2024, "KIVI" (which gives keys a scale a
channel instead).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

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


class StoredCache:
    """Keys and values for a step of one token, in float32, bfloat16 or int8.

    The library's attention reads the floats, all heads at once. Of int8, a sequence and head's keys are a
    matrix (tokens, dim), whose product with the query are the scores, and its values lie transposed, (dim,
    tokens). int8 keys have a scale a row; the scale of an int8 value goes into the weight of its token.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, form: str) -> None:
        """keys, values: (sequences, heads, tokens, dim) float32. form: "float32", "bfloat16" or "int8"."""
        self.form = form
        if form != "int8":
            self.keys, self.values = (tensor.to(getattr(torch, form)) for tensor in (keys, values))
            return
        (keys, key_scale), (values, value_scale) = quantize(keys, 8), quantize(values, 8)
        self.key_scale, self.value_scale = (scale[..., 0].flatten(0, 1) for scale in (key_scale, value_scale))
        self.keys = keys.flatten(0, 1).contiguous()
        self.values = values.transpose(-2, -1).contiguous().flatten(0, 1)
        self.ones = torch.ones(self.values.shape[:2])

    def attend(self, query: torch.Tensor) -> torch.Tensor:
        """query (sequences, heads, dim) -> the same shape: softmax(query keys^T / sqrt(dim)) values."""
        if self.form != "int8":
            one = query[:, :, None].to(self.keys.dtype)
            return F.scaled_dot_product_attention(one, self.keys, self.values)[:, :, 0].float()
        rows = (query * query.shape[-1] ** -0.5).flatten(0, 1)
        scores = _products(rows, self.keys, self.key_scale)
        weights = scores.softmax(-1) * self.value_scale
        return _products(weights, self.values, self.ones).view_as(query)


def _products(rows: torch.Tensor, matrices: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Each row times its matrix (out, in) transposed."""
    return torch.stack([kernels.linear_int8(*each) for each in zip(rows, matrices, scales, strict=True)])
