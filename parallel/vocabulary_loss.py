"""Cross-entropy of logits whose vocabulary is split over ranks, which never gathers them.

Source: Shoeybi et al. 2019 "Megatron-LM", section 3. With an output layer split over the vocabulary
(``ColumnParallelLinear``, its weight maybe tied to ``VocabParallelEmbedding``'s), the loss needs of the
logits x of each rank a few numbers a token:

    m = max over ranks of max_j x_j              all-reduce (max), one number a token
    S = sum over ranks of sum_j exp(x_j - m)     all-reduce (sum), together with the next:
    t = sum over ranks of x_target - m           two numbers a token
    loss = log S - t

(with label smoothing also the sum of x_j - m), where gathering would move the vocabulary. Backward
communicates nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from parallel.partition import Partition, split
from parallel.tensor_regions import Group
from parallel.vocabulary import own_range


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
    own_range(partition, partition.size, group)
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


def predict_communication(
    tokens: int, world_size: int, itemsize: int = 4, smoothed: bool = False
) -> dict[str, int]:
    """Bytes of one loss: max and two sums a token (three with label smoothing) of ``itemsize`` bytes each."""
    return {"all_reduce": (4 if smoothed else 3) * tokens * itemsize} if world_size > 1 else {}
