"""Ulysses: sequence shards of all heads become whole sequences of some heads, by all-to-all, and back.

Source: Jacobs et al. 2023 "DeepSpeed Ulysses", section 3. Each rank holds (batch, heads, n, dim) of its n
positions. An all-to-all gives it (batch, its heads, whole sequence, dim), on which any attention runs
unchanged; a second one returns the output. A rank moves 1/p of what ring attention does, but p is at most the
number of heads (of query heads here: key-value heads that serve several ranks are sent to each). Query, key
and value travel in one message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from kernels.attention import scaled_dot_product_attention
from parallel.attention_shapes import EXCHANGED, checked_lengths
from parallel.partition import Partition, split, split_heads
from parallel.tensor_regions import Group


def _all_to_all(pieces: list[torch.Tensor], sizes: list[int], group: Group) -> list[torch.Tensor]:
    """Piece i goes to rank i; what rank i sent comes back, flat, of ``sizes[i]`` elements."""
    sent = torch.cat([piece.reshape(-1) for piece in pieces])
    received = sent.new_empty(sum(sizes))
    if dist.get_world_size(group) == 1:
        return [sent]
    dist.all_to_all_single(received, sent, sizes, [piece.numel() for piece in pieces], group=group)
    return list(received.split(sizes))


class _Layout:
    """Which heads and positions each rank has, and two all-to-alls between, each the other's inverse."""

    def __init__(self, heads: list[Partition], lengths: list[int], group: Group) -> None:
        self.heads, self.lengths, self.group = heads, lengths, group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def to_heads(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """(batch, all heads, n, dim) -> (batch, own heads, sequence, dim), each tensor with its heads."""
        batch, _, _, dim = shards[0].shape
        held = [heads.sizes[self.rank] for heads in self.heads]
        pieces = [
            torch.cat([heads.take(x, rank, 1) for heads, x in zip(self.heads, shards, strict=True)], 1)
            for rank in range(self.world)
        ]
        arrived = _all_to_all(pieces, [batch * sum(held) * n * dim for n in self.lengths], self.group)
        whole = torch.cat(
            [part.view(batch, sum(held), n, dim) for part, n in zip(arrived, self.lengths, strict=True)], 2
        )
        return list(whole.split(held, 1))

    def to_sequence(self, wholes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """(batch, own heads, sequence, dim) -> (batch, all heads, n, dim); replicas are summed."""
        batch, _, _, dim = wholes[0].shape
        own = self.lengths[self.rank]
        pieces = list(torch.cat(list(wholes), 1).split(self.lengths, 2))
        counts = [sum(heads.sizes[rank] for heads in self.heads) for rank in range(self.world)]
        arrived = _all_to_all(pieces, [batch * count * own * dim for count in counts], self.group)
        shards = [wholes[0].new_zeros(batch, heads.size, own, dim) for heads in self.heads]
        for rank, part in enumerate(arrived):  # in the order of ranks, so that the sum is the same every time
            parts = part.view(batch, counts[rank], own, dim).split([h.sizes[rank] for h in self.heads], 1)
            for shard, heads, piece in zip(shards, self.heads, parts, strict=True):
                for (start, stop), heads_of_range in zip(
                    heads.ranges[rank], piece.split([b - a for a, b in heads.ranges[rank]], 1), strict=True
                ):
                    shard[:, start:stop] += heads_of_range
        return shards


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layout: _Layout, *shards: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.layout = layout
        return tuple(part.contiguous() for part in layout.to_heads(shards))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.layout.to_sequence(grads)


class _ToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layout: _Layout, whole: torch.Tensor) -> torch.Tensor:
        ctx.layout = layout
        return layout.to_sequence([whole])[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, ctx.layout.to_heads([grad])[0]


def ulysses_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    group: Group = None,
    lengths: Sequence[int] | None = None,
) -> torch.Tensor:
    """As ``parallel.context.ring_attention``, of contiguous shards of any length: rank 0 has the first
    positions.

    Attention itself is ``kernels.attention.scaled_dot_product_attention``. ValueError on every rank: as
    there, and when there are fewer query heads than ranks.
    """
    lengths = checked_lengths(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa, lengths, group)
    query_heads, key_heads = split_heads(query.shape[1], key.shape[1], 1, dist.get_world_size(group))
    layout = _Layout([query_heads, key_heads, key_heads], lengths, group)
    query, key, value = _ToHeads.apply(layout, query, key, value)
    seen = scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale, enable_gqa=True)
    return _ToSequence.apply(_Layout([query_heads], lengths, group), seen)


def predict_communication(
    batch: int,
    heads: int,
    kv_heads: int,
    length: int,
    dim: int,
    itemsize: int,
    world_size: int,
    rank: int,
    backward: bool = True,
    exchanged: bool = True,
) -> dict[str, int]:
    """Bytes of one ``ulysses_attention`` of an evenly split sequence (``split(length, world_size)``) on
    ``rank``.

    Operation -> the larger of input and output of each all-to-all: query, key and value in one, the output in
    another, and the same backward. exchanged: as for ``ring_attention``.
    """
    if world_size == 1:
        return {}
    own = split(length, world_size).sizes[rank]
    query, key = split_heads(heads, kv_heads, 1, world_size)
    moved = 0
    for partitions in ([query, key, key], [query]):
        sent = own * sum(sum(partition.sizes) for partition in partitions)
        received = length * sum(partition.sizes[rank] for partition in partitions)
        moved += max(sent, received) * batch * dim * itemsize * (1 + backward)
    return {"all_to_all": moved} | ({"all_gather": world_size * EXCHANGED * 8} if exchanged else {})
