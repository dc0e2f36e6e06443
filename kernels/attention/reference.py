"""Attention as the papers have it: all scores at once, in plain torch."""

from __future__ import annotations

import math

import torch


def band(
    length: int, keys: int, is_causal: bool, window: int | None, device: torch.device | str | None = None
) -> torch.Tensor:
    """(length, keys) bool: whether query i sees key j: j <= i if causal, i - window < j <= i in a window."""
    i = torch.arange(length, device=device)[:, None]
    j = torch.arange(keys, device=device)[None, :]
    seen = torch.ones(length, keys, dtype=torch.bool, device=device)
    if is_causal or window is not None:
        seen = seen & (j <= i)
    if window is not None:
        seen = seen & (j > i - window)
    return seen


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | None = None,
) -> torch.Tensor:
    """softmax(scale * Q K^T + mask) V (Vaswani et al. 2017, section 3.2.1); zeros where no key is seen."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = (1 / math.sqrt(query.shape[-1]) if scale is None else scale) * (query @ key.transpose(-2, -1))
    seen = band(query.shape[-2], key.shape[-2], is_causal, window, query.device)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        seen = seen & attn_mask
    elif attn_mask is not None:
        scores = scores + attn_mask
        seen = seen & (attn_mask != -math.inf)
    scores = scores.masked_fill(~seen, -math.inf)
    some = seen.any(-1, keepdim=True)
    weights = torch.where(some, scores, 0.0).softmax(-1)
    return torch.where(some, weights, 0.0) @ value


def decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lengths: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """The pages of each sequence side by side, then attention of its one query over its first keys."""
    sequences, _, dim = query.shape
    blocks, block_size, kv_heads, _ = key_cache.shape
    table = block_table.long().clamp(0, max(0, blocks - 1))  # places beyond the context may hold anything
    keys = table.shape[1] * block_size

    def gathered(cache: torch.Tensor) -> torch.Tensor:
        return cache[table].reshape(sequences, keys, kv_heads, dim).transpose(1, 2)

    seen = torch.arange(keys, device=query.device) < context_lengths[:, None]
    value = gathered(value_cache)
    return scaled_dot_product_attention(
        query[:, :, None], gathered(key_cache), value, seen[:, None, None], scale=scale, enable_gqa=True
    )[:, :, 0]
