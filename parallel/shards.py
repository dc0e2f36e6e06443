"""Buckets of parameters cut into equal ranges of elements, one for each rank.

A parameter is cut where the range ends, so that ranks hold the same number of elements whatever the shapes: a
rank has at most one padded element more than another for each bucket. (Whole parameters, dealt out by size,
as torch.distributed.optim does it, leave a rank with the largest embedding far above the mean.) What an
optimizer updates elementwise it updates the same in pieces. The layout makes both collectives plain: a
bucket's reduce-scatter leaves each rank the gradients of its range, an all-gather of the ranges rebuilds the
parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from parallel.buckets import Bucket, Slot, assign, bytes_of, limits
from parallel.reducer import Reducer

# torch 2.13's names, and what they were called before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def padded(elements: int, world_size: int) -> int:
    """Elements of a bucket when its ranges are equal: the next multiple of the world size."""
    return -(-elements // world_size) * world_size


def cut(sizes: Sequence[int], start: int, end: int) -> list[tuple[int, int, int]]:
    """(index, first, last) of the parts of tensors laid one after the other that lie within [start, end)."""
    parts, offset = [], 0
    for index, size in enumerate(sizes):
        first, last = max(start - offset, 0), min(end - offset, size)
        if first < last:
            parts.append((index, first, last))
        offset += size
    return parts


def layout(params: Sequence[torch.Tensor], bucket_cap_mb: float | None = None) -> list[list[int]]:
    """Indices of the parameters of each bucket, those that are used last in the first."""
    return assign(params, *limits(bucket_cap_mb))[::-1]


class Piece:
    """What a rank owns of a parameter: elements ``first`` to ``last`` of it, laid out as one dimension."""

    __slots__ = ("first", "last", "offset", "slot", "tensor")

    def __init__(self, slot: Slot, first: int, last: int, offset: int, tensor: torch.Tensor) -> None:
        self.slot, self.first, self.last = slot, first, last
        self.offset = offset  # elements, in the rank's range
        self.tensor = tensor  # (last - first,) view of the parameter's memory: what the optimizer updates

    def gradient(self) -> torch.Tensor | None:
        """This piece of the parameter's gradient, where every rank has the whole of it."""
        gradient = self.slot.param.grad
        return None if gradient is None else gradient.detach().reshape(-1)[self.first : self.last]


class ShardedBucket(Bucket):
    """Parameters made views of one tensor, which is padded and divides by the number of ranks."""

    __slots__ = ("end", "flat", "gradient", "holds_gradient", "incoming", "pieces", "start")

    def __init__(self, index: int, slots: Sequence[Slot], world_size: int, rank: int) -> None:
        super().__init__(index, slots)
        first = slots[0].param
        size = padded(self.elements, world_size)
        self.flat = torch.zeros(size, dtype=first.dtype, device=first.device)
        self.start, self.end = size // world_size * rank, size // world_size * (rank + 1)
        for slot in slots:
            place = self.flat[slot.offset : slot.offset + slot.param.numel()].view(slot.param.shape)
            slot.param.data = place.copy_(slot.param.detach())
        self.pieces = []
        for index, first_element, last_element in cut([s.param.numel() for s in slots], self.start, self.end):
            slot = slots[index]
            begin = slot.offset + first_element
            tensor = self.flat[begin : begin + last_element - first_element]
            self.pieces.append(Piece(slot, first_element, last_element, begin - self.start, tensor))
        self.gradient: torch.Tensor | None = None  # (end - start,) of the range, in stage 2
        self.incoming: torch.Tensor | None = None
        self.holds_gradient = False

    def gather(self, group: Any) -> Any:
        """Everybody's range into everybody's parameters, in place. The work."""
        mine = self.flat[self.start : self.end]
        return _all_gather(self.flat, mine, group=group, async_op=True) if self.elements else None


class Scattered(Reducer):
    """Buckets whose gradients are averaged and left with the owners of their ranges only (ZeRO stage 2).

    Gradients stay where autograd puts them until their bucket is full; then they move to one of two buffers,
    are freed, and the buffer is reduce-scattered while the other fills. Two are enough to overlap; a third
    bucket waits for the first. Later backwards add to the ranges until ``discard``.
    """

    def __init__(
        self, slots: Sequence[Slot], buckets: Sequence[ShardedBucket], group: Any, find_unused: bool
    ) -> None:
        super().__init__(slots, group, find_unused)
        self.buckets: Sequence[ShardedBucket] = buckets
        largest = max((bytes_of(bucket.flat) for bucket in buckets), default=0)
        # Kept from step to step: fresh memory would be page-faulted in again each time.
        self.buffers = [
            torch.empty(largest, dtype=torch.uint8, device=slots[0].param.device) for _ in buckets[:2]
        ]

    def discard(self) -> None:
        """The gradients are used: the next backward starts anew."""
        for bucket in self.buckets:
            bucket.holds_gradient = False
            for piece in bucket.pieces:
                piece.tensor.grad = None

    def _store(self, slot: Slot, gradient: torch.Tensor) -> None:
        """It stays in ``param.grad`` until its bucket is full."""

    def _store_missing(self, slot: Slot) -> None:
        """``_launch`` writes zeros."""

    def _launch(self, bucket: Bucket) -> Any:
        assert isinstance(bucket, ShardedBucket)
        if not bucket.elements:
            return None
        if bucket.index > 1:
            self.wait(self.buckets[bucket.index - 2])
        buffer = self.buffers[bucket.index % 2][: bytes_of(bucket.flat)].view(bucket.flat.dtype)
        for slot in bucket.slots:
            gradient, place = slot.param.grad, buffer[slot.offset : slot.offset + slot.param.numel()]
            if gradient is None:
                place.zero_()
            else:
                torch.mul(gradient.reshape(-1), self.scale[gradient.dtype], out=place)
                slot.param.grad = None
        if bucket.gradient is None:
            bucket.gradient = torch.empty_like(bucket.flat[bucket.start : bucket.end])
        bucket.incoming = torch.empty_like(bucket.gradient) if bucket.holds_gradient else bucket.gradient
        return _reduce_scatter(bucket.incoming, buffer, group=self.group, async_op=True)

    def _finish(self, bucket: Bucket) -> None:
        assert isinstance(bucket, ShardedBucket)
        if bucket.gradient is None or bucket.incoming is None:
            return
        if bucket.incoming is not bucket.gradient:
            bucket.gradient.add_(bucket.incoming)
        bucket.incoming, bucket.holds_gradient = None, True
        for piece in bucket.pieces:
            if piece.slot.used:
                length = piece.last - piece.first
                piece.tensor.grad = bucket.gradient[piece.offset : piece.offset + length]

    def _incomplete(self) -> None:
        """Backward may be a part of a larger one (reentrant checkpoints): whether all came shows at the
        step."""

    def check_complete(self) -> None:
        """RuntimeError if backward left parameters without gradient, so that their buckets were not
        reduced."""
        if names := self.missing():
            self.reset()
            raise RuntimeError(
                f"rank {self.rank} of {self.world_size}: no gradient reached {', '.join(names[:5])}"
                f"{' ...' * (len(names) > 5)} ({len(names)} of {len(self.slots)} parameters); pass "
                "find_unused_parameters=True if the loss need not depend on every parameter"
            )
