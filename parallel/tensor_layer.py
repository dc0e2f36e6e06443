"""What column- and row-parallel linear layers share: a shard of a weight, whose it is, and its replicas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable

from parallel.agreement import CHECK_BYTES, check_fits
from parallel.partition import Partition, split
from parallel.sequence import SequenceParallel
from parallel.sharded import of_one_rank
from parallel.tensor_regions import Group, fresh, start_all_reduce


class ParallelLinear(nn.Module):
    """What both have: a shard of ``nn.Linear``'s weight along ``dim``, and where it belongs."""

    dim: int
    """Dimension of the weight that is split: 0 for the columns of W^T, 1 for its rows."""
    checks_input = True
    """Ranks compare their inputs at each call. ``parallelize`` has them compared once for the whole model."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group: Group = None,
        partition: Partition | None = None,
        sequence: SequenceParallel | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.group, self.sequence = group, sequence
        self.world, self.rank = dist.get_world_size(group), dist.get_rank(group)
        size = in_features if self.dim else out_features
        self.partition = split(size, self.world) if partition is None else partition
        if self.partition.size != size or self.partition.parts != self.world:
            raise ValueError(
                f"the partition is of {self.partition.size} features over {self.partition.parts} ranks; the "
                f"layer splits {size} over {self.world}"
            )
        whole = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._adopt(whole)

    def _adopt(self, linear: nn.Linear) -> None:
        """Keep this rank's shard of a whole layer's parameters, copied, trained if they are."""
        weight = fresh(self.partition.take(linear.weight.detach(), self.rank, self.dim))
        self.weight = of_one_rank(nn.Parameter(weight, linear.weight.requires_grad), self.world)
        self.bias: nn.Parameter | None = None
        if linear.bias is not None:
            bias = linear.bias.detach()
            bias = fresh(bias if self.dim else self.partition.take(bias, self.rank))
            self.bias = of_one_rank(
                nn.Parameter(bias, linear.bias.requires_grad), 1 if self.dim else self.world
            )

    @classmethod
    def from_linear(cls, linear: nn.Linear, group: Group = None, **options: Any) -> Self:
        """This rank's part of ``linear``, the same on every rank before. options: the constructor's."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            group=group,
            device="meta",
            **options,
        )
        layer._adopt(linear)
        return layer

    def shards(self) -> dict[str, tuple[Partition, int]]:
        """Parameter -> (partition, dimension) of those that are split."""
        own: dict[str, tuple[Partition, int]] = {"weight": (self.partition, self.dim)}
        if self.bias is not None and self.dim == 0:
            own["bias"] = (self.partition, 0)
        return own

    def _shared(self, parameter: torch.Tensor) -> torch.Tensor:
        """A parameter with what its replicas on other ranks contribute to its gradient."""
        if not self.partition.replicated or not parameter.requires_grad:
            return parameter
        return _Replicated.apply(parameter, self.partition, self.group)

    def _check_input(self, input: torch.Tensor, wrong: str, split_dims: Sequence[int]) -> None:
        """See ``agreement.check_fits``."""
        if self.checks_input:
            check_fits(input, wrong, split_dims, f"the input of a {type(self).__name__}", self.group)
        elif wrong:
            raise ValueError(wrong)

    def _predict_check(self) -> int:
        return self.checks_input * self.world * CHECK_BYTES

    def _local_size(self) -> int:
        return self.partition.sizes[self.rank]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"held={self._local_size()}, rank={self.rank} of {self.world}, "
            f"sequence={self.sequence is not None}"
        )


class _Replicated(torch.autograd.Function):
    """A shard of which other ranks hold pieces too: its gradient is summed over those that hold it."""

    @staticmethod
    def forward(ctx: Any, shard: torch.Tensor, partition: Partition, group: Group) -> torch.Tensor:
        ctx.partition, ctx.group = partition, group
        return shard.view_as(shard)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        rank = dist.get_rank(ctx.group)
        whole = grad.new_zeros(ctx.partition.size, *grad.shape[1:])
        ctx.partition.put(grad, whole, rank)
        return fresh(ctx.partition.take(start_all_reduce(whole, ctx.group)(), rank)), None, None


def in_autocast_dtype(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """In autocast's dtype where it is on: it does not see what happens in an autograd function's backward."""
    device = input.device.type
    if not torch.is_autocast_enabled(device):
        return input, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
