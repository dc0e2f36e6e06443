"""Ring attention: each rank holds a shard of the sequence, and keys and values travel round.

Source: Liu et al. 2023 "Ring Attention with Blockwise Transformers", section 3 (blocks of keys and values
pass from rank to rank while the block at hand is computed); Dao 2023 "FlashAttention-2" (one log-sum-exp a
query merges outputs and is all that backward needs); the zig-zag order is that of Zhu's ring-flash-attention
and of Llama 3 (Dubey et al. 2024, section 3.3.2).

With a causal mask, contiguous shards would leave rank 0 nearly idle and the last rank with all the work. So
the sequence is cut into 2p chunks and rank i holds chunks i and 2p-1-i. Against the keys of rank j it
computes

    j = i   its own two chunks: ordinary causal attention, for they lie in order
    j < i   all its queries against the earlier chunk of j
    j > i   the queries of its later chunk against both chunks of j

which is half of the full square at every step, on every rank, and no step needs a mask but the own one.

Keys and values of grouped queries travel unrepeated. Backward sends them round once more, and with them the
gradient that each rank adds to, which arrives at home after p steps. Ulysses, the other way:
``parallel.ulysses``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from parallel.attention_block import block_backward, block_forward, merge
from parallel.attention_shapes import EXCHANGED, checked_lengths
from parallel.memory_held import Memory
from parallel.partition import Partition, split
from parallel.tensor_regions import Group


def zigzag(length: int, world_size: int) -> Partition:
    """Rank i holds chunks i and 2p-1-i of the 2p into which ``length`` is cut (of two lengths)."""
    chunks = [piece for (piece,) in split(length, 2 * world_size).ranges]
    return Partition(length, tuple((chunks[i], chunks[-1 - i]) for i in range(world_size)))


def sequence_partition(length: int, world_size: int, is_causal: bool) -> Partition:
    """How ``ring_attention`` wants a sequence of ``length`` split: zig-zag if causal, else contiguous.

    ``sequence_partition(...).take(tokens, rank, dim=1)`` is a rank's shard of (batch, sequence) tokens, and
    of their positions.
    """
    return zigzag(length, world_size) if is_causal else split(length, world_size)


class _Ring:
    """Sends a buffer to the next rank and takes one from the one before, while something else is computed."""

    def __init__(self, group: Group) -> None:
        self.group, self.world, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        self.next, self.previous = ranks[(self.rank + 1) % self.world], ranks[(self.rank - 1) % self.world]
        self.works: list[Any] = []

    def start(self, sent: torch.Tensor, received: torch.Tensor) -> None:
        operations = [
            dist.P2POp(dist.isend, sent, self.next, self.group),
            dist.P2POp(dist.irecv, received, self.previous, self.group),
        ]
        self.works += dist.batch_isend_irecv(operations)

    def finish(self) -> None:
        for work in self.works:
            work.wait()
        self.works.clear()


def _parts(rank: int, other: int, partition: Partition, is_causal: bool) -> tuple[slice, slice, bool]:
    """(own queries, keys of ``other``, causal) that rank computes against the keys of another."""
    everything = slice(None)
    if not is_causal or rank == other:
        return everything, everything, is_causal
    if other < rank:
        start, stop = partition.ranges[other][0]
        return everything, slice(0, stop - start), False
    start, stop = partition.ranges[rank][0]
    return slice(stop - start, None), everything, False


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        partition: Partition,
        is_causal: bool,
        scale: float,
        group: Group,
    ) -> torch.Tensor:
        ring = _Ring(group)
        block = torch.stack([key, value])
        output: torch.Tensor | None = None
        for step in range(ring.world):
            other = (ring.rank - step) % ring.world
            if step < ring.world - 1:
                coming = _block_of(block, partition.sizes[(other - 1) % ring.world])
                ring.start(block, coming)
            rows, keys, causal = _parts(ring.rank, other, partition, is_causal)
            block_key, block_value = block[:, :, :, keys]
            part = block_forward(query[:, :, rows], block_key, block_value, causal, scale)
            if output is None:
                output, log_sum_exp = part
            elif part[1].numel() and block_key.numel():
                merge(output[:, :, rows], log_sum_exp[:, :, rows], *part)
            del part, block_key, block_value  # whose storage would outlive its step
            ring.finish()
            if step < ring.world - 1:
                block = coming
        assert output is not None
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, log_sum_exp)
        ctx.settings = partition, is_causal, scale, group
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, log_sum_exp = ctx.saved_tensors
        partition, is_causal, scale, group = ctx.settings
        ring, gradients = _Ring(group), _Ring(group)
        block = torch.stack([key, value])
        wide = log_sum_exp.dtype  # sums of gradients are float32 for 16-bit tensors
        grad_query = torch.zeros_like(query, dtype=wide)
        arriving = torch.zeros_like(block, dtype=wide)
        for step in range(ring.world):
            other = (ring.rank - step) % ring.world
            if step < ring.world - 1:
                coming = _block_of(block, partition.sizes[(other - 1) % ring.world])
                ring.start(block, coming)
            rows, keys, causal = _parts(ring.rank, other, partition, is_causal)
            block_key, block_value = block[:, :, :, keys]
            part = block_backward(
                grad[:, :, rows],
                query[:, :, rows],
                block_key,
                block_value,
                output[:, :, rows],
                log_sum_exp[:, :, rows],
                causal,
                scale,
            )
            grad_query[:, :, rows] += part[0]
            gradients.finish()  # what the ranks before have added to this block's gradient is here now
            arrived = arriving
            arrived[0, :, :, keys] += part[1]
            arrived[1, :, :, keys] += part[2]
            del part, block_key, block_value  # whose storage would outlive its step
            if ring.world > 1:
                arriving = _block_of(arrived, partition.sizes[(other - 1) % ring.world])
                gradients.start(arrived, arriving)
            ring.finish()
            if step < ring.world - 1:
                block = coming
        gradients.finish()
        grad_key, grad_value = arriving.to(key.dtype)
        return grad_query.to(query.dtype), grad_key, grad_value, None, None, None, None


def _block_of(like: torch.Tensor, length: int) -> torch.Tensor:
    return like.new_empty(*like.shape[:3], length, like.shape[4])


def ring_attention(
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
    """As ``F.scaled_dot_product_attention``, of a sequence of which each rank has a shard: its shard of it.

    query: (batch, heads, n, dim); key, value: (batch, kv_heads, n, dim), n the length of this rank's shard:
    that of ``sequence_partition(length, world_size, is_causal)``. kv_heads: heads, or a divisor with
    ``enable_gqa``. scale: 1 / sqrt(dim) by default. lengths: every rank's n, if they are known to be right;
    else ranks exchange their shapes first. ``functools.partial(ring_attention, group=group)`` is a model's
    attention.

    Sums over blocks are float32 for 16-bit tensors. ValueError: a mask or dropout, which have no such form;
    and on every rank: shapes, dtypes or settings that differ between ranks, lengths that are not the
    partition's.
    """
    lengths = checked_lengths(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa, lengths, group)
    partition = sequence_partition(sum(lengths), dist.get_world_size(group), is_causal)
    if partition.sizes != list(lengths):
        order = "in zig-zag order " if is_causal else ""
        raise ValueError(
            f"the ranks hold {list(lengths)} of a sequence of {sum(lengths)}; {order}it is split as "
            f"{partition.sizes}"
        )
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    return _RingAttention.apply(query, key, value, partition, is_causal, scale, group)


def predict_communication(
    batch: int,
    kv_heads: int,
    length: int,
    dim: int,
    itemsize: int,
    world_size: int,
    rank: int,
    is_causal: bool = False,
    backward: bool = True,
    exchanged: bool = True,
) -> dict[str, int]:
    """Bytes that ``rank`` sends in one ``ring_attention`` and its backward.

    Forward each block of keys and values is sent on but by the rank before its owner. Backward they go
    round again, and the gradients of every block, in at least float32, are sent on by every rank.
    exchanged: the shapes are (``lengths`` was not given).
    """
    if world_size == 1:
        return {}
    sizes = sequence_partition(length, world_size, is_causal).sizes
    token = 2 * batch * kv_heads * dim
    blocks = token * itemsize * (length - sizes[(rank + 1) % world_size])
    sent = blocks * (1 + backward) + backward * token * max(4, itemsize) * length
    return {"send": sent} | ({"all_gather": world_size * EXCHANGED * 8} if exchanged else {})


def predict_memory(
    batch: int,
    heads: int,
    kv_heads: int,
    length: int,
    dim: int,
    itemsize: int,
    world_size: int,
    rank: int,
    is_causal: bool = False,
    workspace: Callable[[int, int], int] = lambda queries, keys: 0,
) -> Memory:
    """Bytes that the backward of one ``ring_attention`` holds at its peak (forward holds less).

    gradients: of this rank's query, key and value. buffers: the rest of the peak. That is, while a block is
    computed, the block and the one on its way, the gradients of a block that are being sent and those that
    have arrived, in at least float32; so a rank holds a few shards, however many ranks there are. workspace:
    what ``block_backward`` of so many queries and keys takes by itself, results included (the kernel's
    affair). Between forward and backward, output and log-sum-exp are kept: heads * n * (dim * itemsize + 4)
    bytes a sequence.
    """
    partition = sequence_partition(length, world_size, is_causal)
    sizes, wide = partition.sizes, max(4, itemsize)
    token = batch * kv_heads * dim * 2  # elements of keys and values, or of their gradients
    own_query = batch * heads * dim * sizes[rank]
    peak = 0
    for step in range(world_size):
        other = (rank - step) % world_size
        held = token * itemsize * sizes[other] + own_query * wide
        if step < world_size - 1:
            held += token * itemsize * sizes[(other - 1) % world_size]
        held += token * wide * (sizes[other] + (step > 0) * sizes[(other + 1) % world_size])
        rows, keys, _ = _parts(rank, other, partition, is_causal)
        queries = len(range(sizes[rank])[rows])
        peak = max(peak, held + workspace(queries, len(range(sizes[other])[keys])))
    gradients = (own_query + token * sizes[rank]) * itemsize
    return Memory(0, gradients, 0, peak - gradients)
