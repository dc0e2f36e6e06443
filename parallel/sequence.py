"""Sequence parallelism: between two tensor-parallel layers each rank holds a shard of the sequence.

Source: Korthikanti et al. 2022 "Reducing Activation Recomputation in Large Transformer Models", section
4.2.2. What tensor parallelism leaves replicated (norms, dropout, the residual stream) is split along the
sequence. The all-reduce after a row-parallel layer becomes a reduce-scatter, and the all-gather that
completes it moves to the next column-parallel layer: the same bytes, activations divided by the number of
ranks. Parameters that act on shards (norms, biases added after the reduce-scatter) get a part of their
gradient on each rank: ``sum_gradient``.

A ``SequenceParallel`` is shared by all layers of a model. Whatever splits the sequence (``scatter``,
``reduce_scatter``) says how long it is, so that it need not divide by the number of ranks, and a shard of a
wrong length is an error.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from parallel.partition import Partition, split
from parallel.tensor_regions import (
    Group,
    copy_to_region,
    gather_from_region,
    reduce_scatter_to_region,
    scatter_to_region,
)


class SequenceParallel:
    """group: the tensor-parallel group. dim: the sequence's dimension, 1 of (batch, sequence, features)."""

    def __init__(self, group: Group = None, dim: int = 1) -> None:
        self.group, self.dim = group, dim
        self.length: int | None = None

    @property
    def partition(self) -> Partition:
        """Of the sequence last split. ValueError: none was."""
        if self.length is None:
            raise ValueError(
                "no sequence has been split yet: scatter or reduce_scatter comes before a gather"
            )
        return split(self.length, dist.get_world_size(self.group))

    def _split(self, whole: torch.Tensor) -> Partition:
        self.length = whole.shape[self.dim]
        return self.partition

    def scatter(self, whole: torch.Tensor) -> torch.Tensor:
        """The own shard of what every rank has; backward all-gathers."""
        return scatter_to_region(whole, self._split(whole), self.dim, self.group)

    def reduce_scatter(self, partial: torch.Tensor) -> torch.Tensor:
        """The own shard of the sum of every rank's part; backward all-gathers."""
        return reduce_scatter_to_region(partial, self._split(partial), self.dim, self.group)

    def gather(self, shard: torch.Tensor, partial: bool = False) -> torch.Tensor:
        """The whole sequence. partial: what follows is parallel, so that backward reduce-scatters."""
        return gather_from_region(shard, self.partition, self.dim, self.group, partial)


def sum_gradients(module: nn.Module, group: Group = None) -> None:
    """From now on backward sums over the group what each rank's shard adds to the gradients of ``module``.

    In ``forward`` each parameter goes through ``copy_to_region``. A hook on the parameter would be lost when
    another strategy, such as FSDP, puts its own in the parameter's place.
    """
    forward = module.forward

    def forward_with_copies(*arguments: Any, **named: Any) -> Any:
        places = [
            (owner._parameters, name, parameter)
            for owner in module.modules()
            for name, parameter in owner._parameters.items()
            if parameter is not None and parameter.requires_grad
        ]
        try:
            for parameters, name, parameter in places:
                parameters[name] = copy_to_region(parameter, group)
            return forward(*arguments, **named)
        finally:
            for parameters, name, parameter in places:
                parameters[name] = parameter

    module.forward = forward_with_copies


def draw_apart(module: nn.Module, rank: int) -> None:
    """From now on ``module``, which sees a shard, draws random numbers from a stream of its own on each rank.

    Else dropout would drop the same places of every shard; and where shards differ in length, the generators
    of the ranks would part for good, and with them what has to be the same on every rank. The streams
    start from one number drawn by all (Megatron-LM's RNG tracker serves the same end). In training only.
    """
    forward = module.forward

    def forward_apart(*arguments: Any, **named: Any) -> Any:
        if not module.training:
            return forward(*arguments, **named)
        seed = int(torch.randint(2**31, ()))
        on_cuda = any(isinstance(value, torch.Tensor) and value.is_cuda for value in arguments)
        with torch.random.fork_rng([torch.cuda.current_device()] if on_cuda else []):
            torch.manual_seed(seed + rank)
            return forward(*arguments, **named)

    module.forward = forward_apart
