"""The vocabulary split over ranks: embedding, and a cross-entropy that never gathers the logits.

Source: Shoeybi et al. 2019 "Megatron-LM", section 3: each rank holds rows of the (vocabulary, features)
table. The embedding looks up the tokens that it holds, zeros for the others, and sums over ranks. With the
output layer split the same way (``ColumnParallelLinear`` over the same, maybe tied, weight), each rank has
logits of its part of the vocabulary, and the loss needs of them three numbers a token:

    m = max over ranks of max_j x_j        all-reduce (max), one float32 a token
    S = sum over ranks of sum_j exp(x_j - m)      \\
    t = sum over ranks of x_target - m             } all-reduce (sum), two float32 a token, three with
    smoothing (X = sum over ranks of sum_j (x_j - m))       / loss = log S - t

where gathering would move vocabulary numbers a token. Backward communicates nothing.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from parallel.partition import Partition, split
from parallel.sequence import SequenceParallel
from parallel.tensor_regions import Group, fresh, reduce_from_region


class VocabParallelEmbedding(nn.Module):
    """``nn.Embedding`` whose rows are split: (...) int -> (..., embedding_dim), the same on every rank.

    The weight is (held, embedding_dim), the shard of what ``nn.Embedding`` draws. With ``sequence`` the
    output is this rank's shard of the sequence, by a reduce-scatter. A token outside the vocabulary is an
    IndexError, as in torch (on the CPU; a GPU would have to stop for it).
    """

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
        self.first, self.stop = _own_range(self.partition, num_embeddings, group)
        whole = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        if padding_idx is not None:
            self.padding_idx = whole.padding_idx  # counted from the front
        self._adopt(whole)

    def _adopt(self, embedding: nn.Embedding) -> None:
        weight = fresh(self.partition.take(embedding.weight.detach(), self.rank))
        self.weight = nn.Parameter(weight, embedding.weight.requires_grad)

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
        """See ``parallel.tensor_plan.predict_communication``."""
        if self.world == 1:
            return Counter()
        if self.sequence is None:
            return Counter(all_reduce=batch * length * self.embedding_dim * itemsize)
        whole = batch * self.world * -(-length // self.world) * self.embedding_dim * itemsize
        return +Counter(reduce_scatter=whole, all_gather=whole * self.weight.requires_grad)

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, rows {self.first} to {self.stop}, "
            f"rank={self.rank} of {self.world}"
        )


def _own_range(partition: Partition, size: int, group: Group) -> tuple[int, int]:
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


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        partition: Partition,
        ignore_index: int,
        label_smoothing: float,
        group: Group,
    ) -> torch.Tensor:
        first, stop = partition.ranges[dist.get_rank(group)][0]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        smallest = torch.finfo(wide.dtype).min
        most = wide.amax(-1) if stop > first else wide.new_full(target.shape, smallest)
        if dist.get_world_size(group) > 1:
            dist.all_reduce(most, dist.ReduceOp.MAX, group)
        shifted = wide - most.unsqueeze(-1)
        own = (target >= first) & (target < stop)
        place = (target - first).masked_fill(~own, 0).unsqueeze(-1)
        sums = wide.new_zeros(3 if label_smoothing else 2, len(target))
        if stop > first:
            sums[1] = shifted.gather(-1, place).squeeze(-1).masked_fill(~own, 0)
            if label_smoothing:
                sums[2] = shifted.sum(-1)
            sums[0] = shifted.exp_().sum(-1)
        if dist.get_world_size(group) > 1:
            dist.all_reduce(sums, group=group)
        log_sum = sums[0].log()
        loss = log_sum - (1 - label_smoothing) * sums[1]
        if label_smoothing:
            loss -= label_smoothing / partition.size * sums[2]
        ignored = target == ignore_index
        ctx.save_for_backward(logits, most.add_(log_sum), place, own, ignored)
        ctx.numbers = label_smoothing, partition.size
        return loss.masked_fill(ignored, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, log_sum_exp, place, own, ignored = ctx.saved_tensors
        smoothing, size = ctx.numbers
        grad = grad.masked_fill(ignored, 0).unsqueeze(-1)
        result = (logits.to(log_sum_exp.dtype) - log_sum_exp.unsqueeze(-1)).exp_()
        if smoothing:
            result -= smoothing / size
        if logits.shape[-1]:
            result.scatter_add_(-1, place, -(1 - smoothing) * own.unsqueeze(-1).to(result.dtype))
        return (result.mul_(grad).to(logits.dtype), *(None,) * 5)


def vocab_parallel_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    group: Group = None,
    *,
    partition: Partition | None = None,
    vocabulary: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """``F.cross_entropy`` of logits whose vocabulary is split over the group; the same on every rank.

    logits: (..., held by this rank). target: (...) int64, of the whole vocabulary, the same on every rank.
    partition: of the vocabulary; or vocabulary: its size, split as ``ColumnParallelLinear`` does by default.
    Statistics are float32 for 16-bit logits, and the loss is, as in Megatron; float64 stays float64.
    reduction: "mean" over the targets that are not ``ignore_index``, "sum", or "none" (...).

    ValueError: shapes that do not fit the partition, an unknown reduction, smoothing outside [0, 1].
    IndexError: a target outside the vocabulary (on the CPU).
    """
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    if partition is None:
        if vocabulary is None:
            raise ValueError("vocabulary (its size) or partition says which logits this rank holds")
        partition = split(vocabulary, world)
    _own_range(partition, partition.size, group)
    if logits.shape[:-1] != target.shape or logits.shape[-1] != partition.sizes[rank]:
        raise ValueError(
            f"rank {rank} has logits {tuple(logits.shape)} and targets {tuple(target.shape)}; with the "
            f"partition the logits are {(*target.shape, partition.sizes[rank])}"
        )
    if reduction not in ("mean", "sum", "none") or not 0 <= label_smoothing <= 1:
        raise ValueError(
            f"reduction={reduction!r} is mean, sum or none; label_smoothing={label_smoothing} is from 0 to 1"
        )
    flat = target.reshape(-1)
    kept = flat != ignore_index
    if target.device.type == "cpu" and bool((kept & ((flat < 0) | (flat >= partition.size))).any()):
        raise IndexError(
            f"a target lies outside the vocabulary of {partition.size}, and is not {ignore_index}"
        )
    loss = _CrossEntropy.apply(
        logits.reshape(flat.numel(), logits.shape[-1]), flat, partition, ignore_index, label_smoothing, group
    )
    if reduction == "mean":
        return loss.sum() / kept.sum()
    return loss.sum() if reduction == "sum" else loss.view(target.shape)


def predict_loss_communication(
    tokens: int, world_size: int, itemsize: int = 4, smoothed: bool = False
) -> dict[str, int]:
    """Bytes of one loss: max and two sums a token (three with label smoothing) of ``itemsize`` bytes each."""
    return {"all_reduce": (4 if smoothed else 3) * tokens * itemsize} if world_size > 1 else {}
