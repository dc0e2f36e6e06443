"""Tensors of the attention lab: the same values at each call, so that proof and timing see the same."""

from __future__ import annotations

from typing import Any

from labs.attention.config import Config


def qkv(config: Config, length: int, kv_heads: int) -> tuple[Any, Any, Any]:
    """query (1, heads, length, dim), key and value (1, kv_heads, length, dim), float32."""
    import torch

    generator = torch.Generator().manual_seed(length)
    shapes = [(1, heads, length, config.dim) for heads in (config.heads, kv_heads, kv_heads)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def token(config: Config, length: int) -> tuple[Any, Any, Any]:
    """The last query (sequences, heads, dim), keys and values (sequences, kv heads, length, dim)."""
    import torch

    generator = torch.Generator().manual_seed(-length)
    query = torch.randn(config.sequences, config.heads, config.dim, generator=generator)
    shape = (config.sequences, config.shared_heads, length, config.dim)
    return query, torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def paged(config: Config, cache: Any) -> tuple[Any, Any]:
    """The cache as pages (blocks, block, kv heads, dim) in random order, and the block table of each
    sequence (sequences, blocks), int32."""
    import torch

    sequences, kv_heads, length, dim = cache.shape
    each = -(-length // config.block)
    padded = torch.zeros(sequences, kv_heads, each * config.block, dim)
    padded[:, :, :length] = cache
    blocks = padded.view(sequences, kv_heads, each, config.block, dim).permute(0, 2, 3, 1, 4)
    order = torch.randperm(sequences * each, generator=torch.Generator().manual_seed(1))
    pages = torch.empty(sequences * each, config.block, kv_heads, dim)
    pages[order] = blocks.reshape(sequences * each, config.block, kv_heads, dim)
    return pages, order.view(sequences, each).int()


def quantized(cache: Any) -> tuple[Any, Any]:
    """(int8 values, float32 scale for each token and head): value = int8 * scale, symmetric."""
    import torch

    scale = cache.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (cache / scale).round().to(torch.int8), scale
