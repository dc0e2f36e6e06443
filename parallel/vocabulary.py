"""The vocabulary split over ranks: embedding. The loss is ``parallel.vocabulary_loss``.

Source: Shoeybi et al. 2019 "Megatron-LM", section 3: each rank holds rows of the (vocabulary, features)
table, looks up the tokens that it holds, takes zeros for the others, and the sum over ranks is the embedding.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from parallel.agreement import CHECK_BYTES, check_fits
from parallel.partition import Partition, split
from parallel.sequence import SequenceParallel
from parallel.sharded import of_one_rank
from parallel.tensor_regions import Group, fresh, reduce_from_region


class VocabParallelEmbedding(nn.Module):
    """``nn.Embedding`` whose rows are split: (...) int -> (..., embedding_dim), the same on every rank.

    The weight is (held, embedding_dim), the shard of what ``nn.Embedding`` draws. With ``sequence`` the
    output is this rank's shard of the sequence, by a reduce-scatter. A token outside the vocabulary is an
    IndexError, as in torch (on the CPU; a GPU would have to stop for it).
    """

    checks_input = True
    """As ``tensor_layer.ParallelLinear``'s."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        group: Group = None,
        partition: Partition | None = None,
        sequence: SequenceParallel | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.group, self.sequence = group, sequence
        self.world, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.partition = split(num_embeddings, self.world) if partition is None else partition
        self.first, self.stop = own_range(self.partition, num_embeddings, group)
        whole = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        if padding_idx is not None:
            self.padding_idx = whole.padding_idx  # counted from the front
        self._adopt(whole)

    def _adopt(self, embedding: nn.Embedding) -> None:
        weight = fresh(self.partition.take(embedding.weight.detach(), self.rank))
        self.weight = of_one_rank(nn.Parameter(weight, embedding.weight.requires_grad), self.world)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, group: Group = None, **options: Any) -> Self:
        """This rank's rows of ``embedding``, which must be the same on every rank.

        ValueError: options of nn.Embedding that look at whole rows of the whole table (max_norm, sparse,
        scale_grad_by_freq).
        """
        if embedding.max_norm is not None or embedding.sparse or embedding.scale_grad_by_freq:
            raise ValueError("max_norm, sparse and scale_grad_by_freq have no vocabulary-parallel form")
        layer = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.padding_idx,
            group=group,
            device="meta",
            **options,
        )
        layer._adopt(embedding)
        return layer

    def shards(self) -> dict[str, tuple[Partition, int]]:
        """Parameter -> (partition, dimension) of those that are split."""
        return {"weight": (self.partition, 0)}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.checks_input:
            check_fits(input, "", (), "the input of a VocabParallelEmbedding", self.group)
        if input.device.type == "cpu" and input.numel():
            low, high = int(input.min()), int(input.max())
            if low < 0 or high >= self.num_embeddings:
                raise IndexError(f"tokens from {low} to {high}; the vocabulary has {self.num_embeddings}")
        foreign = (input < self.first) | (input >= self.stop)
        if self.stop > self.first:
            local = (input - self.first).masked_fill(foreign, 0)
            own = self.padding_idx is not None and self.first <= self.padding_idx < self.stop
            padding = self.padding_idx - self.first if own and self.padding_idx is not None else None
            partial = F.embedding(local, self.weight, padding).masked_fill(foreign.unsqueeze(-1), 0)
        else:
            partial = self.weight.new_zeros(*input.shape, self.embedding_dim)
        if self.sequence is not None:
            return self.sequence.reduce_scatter(partial)
        return reduce_from_region(partial, self.group)

    def predict_communication(
        self, batch: int, length: int, itemsize: int, input_gradient: bool = False
    ) -> Counter[str]:
        """See ``parallel.tensor_prediction``."""
        if self.world == 1:
            return Counter()
        moved = Counter(all_gather=self.checks_input * self.world * CHECK_BYTES)
        if self.sequence is None:
            return +moved + Counter(all_reduce=batch * length * self.embedding_dim * itemsize)
        whole = batch * self.world * -(-length // self.world) * self.embedding_dim * itemsize
        return moved + Counter(reduce_scatter=whole, all_gather=whole * self.weight.requires_grad)

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, rows {self.first} to {self.stop}, "
            f"rank={self.rank} of {self.world}"
        )


def own_range(partition: Partition, size: int, group: Group) -> tuple[int, int]:
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    if partition.size != size or partition.parts != world or partition.replicated:
        raise ValueError(
            f"the partition is of {partition.size} over {partition.parts} ranks"
            f"{', some on several' if partition.replicated else ''}; the vocabulary of {size} is split over "
            f"{world}"
        )
    if len(partition.ranges[rank]) != 1:
        raise ValueError("a rank holds one range of the vocabulary, not several")
    return partition.ranges[rank][0]
