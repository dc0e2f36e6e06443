"""Attention of a sequence to itself or to another, with shared key heads and a cache, as one module.

Sources: Vaswani et al. 2017, section 3.2; Shazeer 2019 (one key head for all: multi-query); Ainslie et al.
2023 (one for a group of query heads: grouped).
"""

from __future__ import annotations

import importlib

import torch
from torch import nn

from labs.models.configuration import BlockConfig
from labs.models.positions import Rotation, rotary_embedding


class KeyValueCache:
    """Keys and values of the tokens seen so far, of one attention; room for ``capacity`` of them.

    The memory is taken at the first ``append``, with the shape, dtype and device of what arrives, so that a
    rank that holds some of the heads keeps those only.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity} tokens; a cache has room for at least 1")
        self.capacity = capacity
        self.length = 0
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps (batch, kv_heads, length, head_dim) of both; returns ``read()``. ValueError where full."""
        batch, heads, length, dim = key.shape
        if self.keys is None or self.values is None:
            self.keys, self.values = (key.new_empty(batch, heads, self.capacity, dim) for _ in range(2))
        if self.length + length > self.capacity:
            raise ValueError(
                f"the cache holds {self.length} of {self.capacity} tokens; {length} more need a capacity of "
                f"{self.length + length}"
            )
        if self.keys.shape[0] != batch:
            raise ValueError(f"the cache holds {self.keys.shape[0]} sequences, and {batch} arrive")
        self.keys[:, :, self.length : self.length + length] = key
        self.values[:, :, self.length : self.length + length] = value
        self.length += length
        return self.read()

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values so far, views of (batch, kv_heads, length, head_dim)."""
        if self.keys is None or self.values is None:
            raise ValueError("the cache is empty; append comes first")
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class Attention(nn.Module):
    """softmax(query key^T / sqrt(head_dim)) value, in heads, between two linear layers.

    Self-attention, or cross-attention where ``forward`` is given the other sequence's states. How many heads
    there are is read off the projections' outputs, so that a rank may hold some of them. ``attend`` is
    ``scaled_dot_product_attention`` of the configured namespace, and may be replaced by a function of the
    same signature (a ring over ranks).
    """

    def __init__(self, config: BlockConfig, causal: bool) -> None:
        super().__init__()
        self.causal, self.dropout, self.size_of_head = causal, config.dropout, config.size_of_head
        queries, keys = config.heads * self.size_of_head, config.key_heads * self.size_of_head
        self.query = nn.Linear(config.width, queries, config.bias)
        self.key = nn.Linear(config.width, keys, config.bias)
        self.value = nn.Linear(config.width, keys, config.bias)
        self.output = nn.Linear(queries, config.width, config.bias)
        functional = importlib.import_module(config.functional)
        self.attend = functional.scaled_dot_product_attention
        self.rotate = getattr(functional, "rotary_embedding", rotary_embedding)  # torch has none

    def forward(
        self,
        x: torch.Tensor,
        memory: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        rotation: Rotation | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """(batch, length, width) to the same.

        memory: (batch, keys, width), the states attended to; x itself by default.
        mask: bool, True where a query may see a key, broadcastable to (batch, heads, length, keys); a causal
            module combines it with its own.
        rotation: cos and sin of the positions of x, for self-attention.
        cache: what came before x. Of cross-attention: keys and values of the memory, computed once.
        """
        query = self._heads(self.query(x))
        if memory is not None and cache is not None and cache.length:
            key, value = cache.read()
        else:
            source = x if memory is None else memory
            key, value = self._heads(self.key(source)), self._heads(self.value(source))
            if rotation is not None:
                query, key = self.rotate(query, *rotation), self.rotate(key, *rotation)
            if cache is not None:
                key, value = cache.append(key, value)
        whole = query.shape[-2] == key.shape[-2]
        if self.causal and (mask is not None or not whole):
            seen = _causal(query.shape[-2], key.shape[-2], query.device)
            mask = seen if mask is None else mask & seen
        attended = self.attend(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal and mask is None,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return self.output(attended.transpose(1, 2).flatten(2))

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        """(batch, length, heads head_dim) as (batch, heads, length, head_dim)."""
        return projected.unflatten(-1, (-1, self.size_of_head)).transpose(1, 2)


def _causal(length: int, keys: int, device: torch.device) -> torch.Tensor:
    """Which keys the last ``length`` tokens of ``keys`` may see: those up to themselves."""
    return torch.ones(length, keys, dtype=torch.bool, device=device).tril(keys - length)
