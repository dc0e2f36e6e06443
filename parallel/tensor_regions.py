"""Into and out of the tensor-parallel region: Megatron-LM's conjugate functions f and g, and their shards.

Source: Shoeybi et al. 2019 "Megatron-LM", section 3 (f is ``copy_to_region``, g ``reduce_from_region``);
Korthikanti et al. 2022 "Reducing Activation Recomputation", section 4.2.2 (g-bar: reduce-scatter forward,
all-gather backward, along the sequence).

    function                    forward          backward
    copy_to_region              nothing          all-reduce
    reduce_from_region          all-reduce       nothing
    scatter_to_region           own shard        all-gather
    gather_from_region          all-gather       own shard, or reduce-scatter
    reduce_scatter_to_region    reduce-scatter   all-gather

A shard is along any dimension and its length may differ by rank (``parallel.partition``): shards are padded
to the longest for the collective, which wants equal ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from parallel.partition import Partition

Group: TypeAlias = dist.ProcessGroup | None

# torch 2.13's names; before, the same functions were called otherwise.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def start_all_reduce(tensor: torch.Tensor, group: Group) -> Callable[[], torch.Tensor]:
    """Sum ``tensor`` over the group in place, meanwhile; the function returned waits and gives it."""
    if dist.get_world_size(group) == 1:
        return lambda: tensor
    work = dist.all_reduce(tensor, group=group, async_op=True)

    def finish() -> torch.Tensor:
        work.wait()
        return tensor

    return finish


def start_all_gather(
    shard: torch.Tensor, partition: Partition, dim: int, group: Group
) -> Callable[[], torch.Tensor]:
    """Every rank's shard along ``dim``, put together, meanwhile; the function returned waits and gives it.

    ValueError: the shard is not as long as the partition says.
    """
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    if partition.parts != world or shard.shape[dim] != partition.sizes[rank]:
        raise ValueError(
            f"rank {rank} of {world} has {shard.shape[dim]} elements along dimension {dim} of a shard of "
            f"{partition.size} that is split over {partition.parts} ranks as {partition.sizes}"
        )
    if world == 1:
        return lambda: shard
    longest, rows = partition.largest, shard.movedim(dim, 0)
    if len(rows) < longest:
        rows = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
    gathered = rows.new_empty(world * longest, *rows.shape[1:])
    work = all_gather(gathered, rows.contiguous(), group=group, async_op=True)

    def finish() -> torch.Tensor:
        work.wait()
        if partition.even:
            return gathered.movedim(0, dim).contiguous()
        pieces = [piece[:size] for piece, size in zip(gathered.split(longest), partition.sizes, strict=True)]
        return partition.place([piece.movedim(0, dim) for piece in pieces], dim)

    return finish


def start_reduce_scatter(
    whole: torch.Tensor, partition: Partition, dim: int, group: Group
) -> Callable[[], torch.Tensor]:
    """The own shard along ``dim`` of the group's sum, meanwhile; the function returned waits and gives it.

    ValueError: the tensor is not as long as the partition says.
    """
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    if partition.parts != world or whole.shape[dim] != partition.size:
        raise ValueError(
            f"rank {rank} of {world} has {whole.shape[dim]} elements along dimension {dim}, which is of "
            f"{partition.size}, to be split over {partition.parts} ranks"
        )
    if world == 1:
        return lambda: whole
    longest, rows = partition.largest, whole.movedim(dim, 0)
    if not partition.even:
        shards = [partition.take(rows, part) for part in range(world)]
        rows = rows.new_zeros(world * longest, *rows.shape[1:])
        for place, part in zip(rows.split(longest), shards, strict=True):
            place[: len(part)] = part
    shard = rows.new_empty(longest, *rows.shape[1:])
    work = reduce_scatter(shard, rows.contiguous(), group=group, async_op=True)

    def finish() -> torch.Tensor:
        work.wait()
        return shard[: partition.sizes[rank]].movedim(0, dim).contiguous()

    return finish


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return input.view_as(input)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return start_all_reduce(fresh(grad), ctx.group)(), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, group: Group) -> torch.Tensor:
        return start_all_reduce(fresh(input), group)()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, partition: Partition, dim: int, group: Group) -> torch.Tensor:
        ctx.place = partition, dim, group
        return partition.take(input, dist.get_rank(group), dim).clone(memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return start_all_gather(grad, *ctx.place)(), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, partition: Partition, dim: int, group: Group, partial: bool
    ) -> torch.Tensor:
        ctx.place, ctx.partial = (partition, dim, group), partial
        whole = start_all_gather(input, partition, dim, group)()
        return whole.view_as(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        partition, dim, group = ctx.place
        if ctx.partial:
            shard = start_reduce_scatter(grad, partition, dim, group)()
        else:
            shard = partition.take(grad, dist.get_rank(group), dim)
        return shard, None, None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, partition: Partition, dim: int, group: Group) -> torch.Tensor:
        ctx.place = partition, dim, group
        shard = start_reduce_scatter(input, partition, dim, group)()
        return shard.view_as(shard)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return start_all_gather(grad, *ctx.place)(), None, None, None


def fresh(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that may be summed in place: a gradient or an input is not ours to overwrite."""
    return tensor.clone(memory_format=torch.contiguous_format)


def copy_to_region(input: torch.Tensor, group: Group = None) -> torch.Tensor:
    """``input``, the same on every rank; its gradient, of which each rank has a part, is summed."""
    return _Copy.apply(input, group)


def reduce_from_region(input: torch.Tensor, group: Group = None) -> torch.Tensor:
    """The sum of every rank's ``input``; its gradient is the same on every rank already."""
    return _Reduce.apply(input, group)


def scatter_to_region(
    input: torch.Tensor, partition: Partition, dim: int = -1, group: Group = None
) -> torch.Tensor:
    """The own shard along ``dim`` of ``input``, which is the same on every rank."""
    return _Scatter.apply(input, partition, dim, group)


def gather_from_region(
    input: torch.Tensor, partition: Partition, dim: int = -1, group: Group = None, partial: bool = False
) -> torch.Tensor:
    """The whole of every rank's shard along ``dim``.

    partial: each rank has a part of the gradient (what follows is parallel), which is summed; else every rank
    has the same, and takes its shard.
    """
    return _Gather.apply(input, partition, dim, group, partial)


def reduce_scatter_to_region(
    input: torch.Tensor, partition: Partition, dim: int = -1, group: Group = None
) -> torch.Tensor:
    """The own shard along ``dim`` of the sum of every rank's ``input``."""
    return _ReduceScatter.apply(input, partition, dim, group)
