"""Tensor parallelism: a linear layer split over its output features or over its input features.

Source: Shoeybi et al. 2019 "Megatron-LM", section 3. Y = X W^T + b with W (out, in):

- ``ColumnParallelLinear`` gives each rank rows of W (columns of W^T): X is whole on every rank, Y is split.
- ``RowParallelLinear`` gives each rank columns of W: X is split as the column-parallel layer left it, Y is
  the sum of every rank's product: one all-reduce.

A block of column, any elementwise function, row (or attention on whole heads) then communicates once forward
and once backward, where the column-parallel layer sums the gradient of X. That sum runs while the weight's
gradient is computed. With sequence parallelism (``parallel.sequence``) X and Y outside are shards of the
sequence.

Sizes need not divide by the number of ranks, and attention heads stay whole: ``parallel.partition``.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from parallel.memory_held import Memory
from parallel.partition import Partition, split
from parallel.tensor_layer import ParallelLinear, in_autocast_dtype
from parallel.tensor_regions import (
    Group,
    copy_to_region,
    gather_from_region,
    reduce_from_region,
    scatter_to_region,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)


class _ColumnLinear(torch.autograd.Function):
    """X W^T + b whose backward sums the gradient of X over the group while it computes that of W.

    With sequence parallelism X comes as a shard and is gathered; only the shard is kept for backward, which
    gathers it again while it computes the gradient of X (Korthikanti et al., section 4.2.2).
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        group: Group,
        place: tuple[Partition, int] | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, weight)
        ctx.group, ctx.place = group, place
        whole = input if place is None else start_all_gather(input, place[0], place[1], group)()
        return F.linear(whole, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_input = grad_weight = grad_bias = None
        gathered = None
        if needs_weight and ctx.place is not None:
            gathered = start_all_gather(input, ctx.place[0], ctx.place[1], ctx.group)
        if needs_input:
            partial = grad @ weight
            if ctx.place is None:
                reduced = start_all_reduce(partial, ctx.group)
            else:
                reduced = start_reduce_scatter(partial, ctx.place[0], ctx.place[1], ctx.group)
        if needs_weight:
            whole = input if gathered is None else gathered()
            grad_weight = grad.flatten(0, -2).T @ whole.flatten(0, -2)
        if needs_bias:
            grad_bias = grad.flatten(0, -2).sum(0)
        if needs_input:
            grad_input = reduced()
        return grad_input, grad_weight, grad_bias, None, None


class ColumnParallelLinear(ParallelLinear):
    """``nn.Linear`` whose output features are split: (..., in) -> (..., held by this rank).

    The input is the same on every rank; with ``sequence`` it is this rank's shard of the sequence. Weight
    (held, in) and bias (held) start as the shard of what ``nn.Linear`` draws, so that ranks seeded alike hold
    parts of the very layer that a single process would have.

    gather_output: give the whole output, on every rank. input_is_copied: the input has been through
    ``copy_to_region`` (or ``sequence.gather(partial=True)``) already, once for several layers.
    """

    dim = 0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        gather_output: bool = False,
        input_is_copied: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, **options)
        self.gather_output, self.input_is_copied = gather_output, input_is_copied

    def _check(self, input: torch.Tensor, place: tuple[Partition, int] | None) -> None:
        """Before any communication: a shape that does not fit is an error on every rank."""
        wrong, shape = "", tuple(input.shape)
        if not shape or shape[-1] != self.in_features:
            wrong = f"rank {self.rank} got an input {shape} for a layer of {self.in_features} input features"
        elif place is not None and shape[place[1]] != place[0].sizes[self.rank]:
            wrong = (
                f"rank {self.rank} got an input {shape}; of dimension {place[1]} it has "
                f"{place[0].sizes[self.rank]} of {place[0].size} as its shard of the sequence"
            )
        self._check_input(input, wrong, (-1,) if place is None else (-1, place[1]))

    def predict_activations(self, batch: int, length: int, itemsize: int) -> int:
        """Bytes kept for backward: the input, or this rank's shard of it."""
        if not self.weight.requires_grad:
            return 0
        if self.sequence is not None and not self.input_is_copied:
            length = split(length, self.world).sizes[self.rank]
        return batch * length * self.in_features * itemsize

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        place = None
        if self.sequence is not None and not self.input_is_copied:
            place = self.sequence.partition, self.sequence.dim
        self._check(input, place)
        weight = self._shared(self.weight)
        bias = None if self.bias is None else self._shared(self.bias)
        input, weight, bias = in_autocast_dtype(input, weight, bias)
        if self.input_is_copied:
            output = F.linear(input, weight, bias)
        else:
            output = _ColumnLinear.apply(input, weight, bias, self.group, place)
        if self.gather_output:
            output = gather_from_region(output, self.partition, -1, self.group)
        return output

    def predict_communication(
        self, batch: int, length: int, itemsize: int, input_gradient: bool = True
    ) -> Counter[str]:
        """See ``parallel.tensor_prediction``."""
        moved: Counter[str] = Counter()
        if self.world == 1:
            return moved
        moved["all_gather"] += self._predict_check()
        if not self.input_is_copied:
            if self.sequence is None:
                moved["all_reduce"] += input_gradient * batch * length * self.in_features * itemsize
            else:
                whole = batch * self.world * -(-length // self.world) * self.in_features * itemsize
                moved["all_gather"] += whole * (1 + self.weight.requires_grad)
                moved["reduce_scatter"] += whole * input_gradient
        if self.gather_output:
            moved["all_gather"] += batch * length * self.world * self.partition.largest * itemsize
        if self.partition.replicated:
            rows = self.weight.requires_grad * self.in_features
            rows += self.bias is not None and self.bias.requires_grad
            moved["all_reduce"] += rows * self.out_features * self.weight.itemsize
        return +moved


class RowParallelLinear(ParallelLinear):
    """``nn.Linear`` whose input features are split: (..., held by this rank) -> (..., out), summed.

    The output is the same on every rank; with ``sequence`` it is this rank's shard of the sequence. The
    weight is (out, held); the bias (out) is whole on every rank and added once, after the sum.
    input_is_parallel False: the input is whole, and split here.

    ValueError: a partition in which ranks share features, whose products would be summed twice.
    """

    dim = 1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        input_is_parallel: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, **options)
        self.input_is_parallel = input_is_parallel
        if self.partition.replicated:
            raise ValueError("ranks share input features: their products would be summed twice")

    def predict_activations(self, batch: int, length: int, itemsize: int) -> int:
        """Bytes kept for backward: this rank's features of the input."""
        return self.weight.requires_grad * batch * length * self._local_size() * itemsize

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        wanted = self._local_size() if self.input_is_parallel else self.in_features
        wrong = ""
        if input.shape[-1] != wanted:
            wrong = f"rank {self.rank} got {input.shape[-1]} input features and takes {self.in_features}"
            if self.input_is_parallel:
                wrong = (
                    f"rank {self.rank} got {input.shape[-1]} input features and holds {wanted} of "
                    f"{self.in_features}; the layer before must be column-parallel with the same partition"
                )
        self._check_input(input, wrong, (-1,))
        if not self.input_is_parallel:
            input = scatter_to_region(input, self.partition, -1, self.group)
        input, weight, bias = in_autocast_dtype(input, self.weight, self.bias)
        partial = F.linear(input, weight)
        if self.sequence is None:
            output = reduce_from_region(partial, self.group)
        else:
            output = self.sequence.reduce_scatter(partial)
            if bias is not None:  # each rank adds it to its shard, and has that part of its gradient
                bias = copy_to_region(bias, self.group)
        return output if bias is None else output + bias

    def predict_communication(
        self, batch: int, length: int, itemsize: int, input_gradient: bool = True
    ) -> Counter[str]:
        """See ``parallel.tensor_prediction``."""
        moved: Counter[str] = Counter()
        if self.world == 1:
            return moved
        moved["all_gather"] += self._predict_check()
        backward = input_gradient or self.weight.requires_grad
        if not self.input_is_parallel and input_gradient:
            moved["all_gather"] += batch * length * self.world * self.partition.largest * itemsize
        if self.sequence is None:
            moved["all_reduce"] += batch * length * self.out_features * itemsize
        else:
            whole = batch * self.world * -(-length // self.world) * self.out_features * itemsize
            moved["reduce_scatter"] += whole
            moved["all_gather"] += whole * backward
            if self.bias is not None and self.bias.requires_grad:
                moved["all_reduce"] += self.out_features * itemsize
        return +moved


def predict_memory(
    layer: ColumnParallelLinear | RowParallelLinear,
    batch: int,
    length: int,
    itemsize: int,
    optimizer_copies: int = 2,
) -> Memory:
    """Bytes that this rank holds of one layer, before its backward, for (batch, length) positions.

    Parameters and gradients are a shard; the optimizer keeps ``optimizer_copies`` of them (2: Adam's
    moments). buffers: the activations kept for backward, of ``itemsize`` bytes. A column-parallel layer keeps
    its whole input, with sequence parallelism a shard of it (and gathers it again); a row-parallel one its
    features of it.
    """
    parameters = list(layer.parameters())
    trained = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
    return Memory(
        sum(parameter.nbytes for parameter in parameters),
        trained,
        optimizer_copies * trained,
        layer.predict_activations(batch, length, itemsize),
    )
