"""Who holds which part of a dimension: whole units, heads with their keys, sections of a fused weight.

A ``Partition`` names for every rank the ranges that it holds of a dimension, in the order in which they lie
in its shard. Sizes need not divide: the first ranks hold one unit more, as in ``torch.tensor_split``. A range
that several ranks hold is replicated (a key-value head that serves the queries of two ranks); whoever sums
gradients has to know it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch

Range = tuple[int, int]


@dataclass(frozen=True)
class Partition:
    """size: length of the whole dimension. ranges: for each rank, (start, stop) of each piece it holds."""

    size: int
    ranges: tuple[tuple[Range, ...], ...]

    def __post_init__(self) -> None:
        reached = 0
        for start, stop in sorted(piece for pieces in self.ranges for piece in pieces):
            if not 0 <= start <= stop <= self.size:
                raise ValueError(f"a rank holds [{start}, {stop}) of a dimension of {self.size}")
            if start > reached:
                break
            reached = max(reached, stop)
        if reached < self.size:
            raise ValueError(f"no rank holds element {reached} of {self.size}")

    @property
    def parts(self) -> int:
        return len(self.ranges)

    @cached_property
    def sizes(self) -> list[int]:
        """Elements held by each rank."""
        return [sum(stop - start for start, stop in pieces) for pieces in self.ranges]

    @property
    def largest(self) -> int:
        """Elements of the longest shard: what shards are padded to where a collective wants them equal."""
        return max(self.sizes)

    @cached_property
    def even(self) -> bool:
        """Whether all shards are equally long, and one after the other they are the whole."""
        pieces = [piece for pieces in self.ranges for piece in pieces]
        stops = [0, *(stop for _, stop in pieces)]
        return len(set(self.sizes)) == 1 and [start for start, _ in pieces] == stops[:-1]

    @property
    def replicated(self) -> bool:
        """Whether some element lies on several ranks."""
        return sum(self.sizes) > self.size

    def take(self, tensor: torch.Tensor, rank: int, dim: int = 0) -> torch.Tensor:
        """The shard of ``rank``: a view where it is one range, else a copy."""
        if tensor.shape[dim] != self.size:
            raise ValueError(
                f"dimension {dim} has {tensor.shape[dim]} elements; the partition is of {self.size}"
            )
        pieces = [tensor.narrow(dim, start, stop - start) for start, stop in self.ranges[rank]]
        return pieces[0] if len(pieces) == 1 else torch.cat([*pieces, tensor.narrow(dim, 0, 0)], dim)

    def place(self, shards: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
        """The whole from every rank's shard; of replicas, the lowest rank's."""
        shape = list(shards[0].shape)
        shape[dim] = self.size
        whole = shards[0].new_empty(shape)
        for rank in reversed(range(self.parts)):
            self.put(shards[rank], whole, rank, dim)
        return whole

    def put(self, shard: torch.Tensor, whole: torch.Tensor, rank: int, dim: int = 0) -> None:
        """Write the shard of ``rank`` to its places in ``whole``."""
        lengths = [stop - start for start, stop in self.ranges[rank]]
        for (start, stop), piece in zip(self.ranges[rank], shard.split(lengths, dim), strict=True):
            whole.narrow(dim, start, stop - start).copy_(piece)


def split(size: int, parts: int, unit: int = 1) -> Partition:
    """Contiguous shards of whole units (heads of ``unit`` elements, say), the first ranks one more.

    ValueError: ``size`` is no multiple of ``unit``.
    """
    if parts < 1 or unit < 1 or size < 0 or size % unit:
        raise ValueError(f"{size} elements in units of {unit} over {parts} ranks: no multiple of the unit")
    units, more = divmod(size // unit, parts)
    stops = [0, *accumulate((units + (part < more)) * unit for part in range(parts))]
    return Partition(size, tuple(((start, stop),) for start, stop in pairwise(stops)))


def split_heads(heads: int, kv_heads: int, head_dim: int, parts: int) -> tuple[Partition, Partition]:
    """(partition of the queries' features, of the keys' or values'), each query with its key on one rank.

    heads: query heads, a multiple of kv_heads (grouped queries, Ainslie et al. 2023); head_dim: features of
    one. With kv_heads >= parts every rank gets whole groups. With fewer, the ranks are split over the
    key-value heads, and those that share one split its query heads; its keys are then replicated.

    ValueError: heads no multiple of kv_heads, or a rank would be left without a head.
    """
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{heads} query heads are no multiple of {kv_heads} key-value heads")
    group = heads // kv_heads
    if kv_heads >= parts:
        return (
            split(heads * head_dim, parts, group * head_dim),
            split(kv_heads * head_dim, parts, head_dim),
        )
    query: list[tuple[Range, ...]] = []
    key: list[tuple[Range, ...]] = []
    for kv_head, ((first, last),) in enumerate(split(parts, kv_heads).ranges):
        if last - first > group:
            raise ValueError(
                f"{heads} query heads of {kv_heads} key-value heads leave a rank of {parts} without a head; "
                f"the most ranks are {heads}, with {group} to each key-value head"
            )
        for ((start, stop),) in split(group, last - first).ranges:
            query.append((((kv_head * group + start) * head_dim, (kv_head * group + stop) * head_dim),))
            key.append(((kv_head * head_dim, (kv_head + 1) * head_dim),))
    return Partition(heads * head_dim, tuple(query)), Partition(kv_heads * head_dim, tuple(key))


def concatenated(partitions: Sequence[Partition]) -> Partition:
    """Of a dimension that holds several, one after the other: fused query, key, value; fused gate, up."""
    if len({partition.parts for partition in partitions}) != 1:
        raise ValueError(f"partitions over {[partition.parts for partition in partitions]} ranks do not join")
    offsets = [0, *accumulate(partition.size for partition in partitions)]
    return Partition(
        offsets[-1],
        tuple(
            tuple(
                (start + offset, stop + offset)
                for offset, partition in zip(offsets, partitions, strict=False)
                for start, stop in partition.ranges[rank]
            )
            for rank in range(partitions[0].parts)
        ),
    )
