"""What is sharded, and how: policies, places of parameters in a module, and in the buffers of a group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class MixedPrecisionPolicy:
    """torch.distributed.fsdp's (which serves as well): dtypes of what is gathered, reduced and returned.

    param_dtype: of the gathered parameters, hence of compute; None: the parameters' own.
    reduce_dtype: of the gradients while they are reduced; None: that of compute.
    output_dtype: forward's floating-point outputs are cast to it. cast_forward_inputs: its inputs to
    param_dtype.
    """

    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    output_dtype: torch.dtype | None = None
    cast_forward_inputs: bool = True


@dataclass(frozen=True)
class CPUOffloadPolicy:
    """torch.distributed.fsdp's (which serves as well): shards, their gradients and state live on the CPU."""

    pin_memory: bool = True


class Mesh(NamedTuple):
    """shard: ranks that split the parameters. replicate: ranks that hold the same shard (HSDP), or None."""

    shard: dist.ProcessGroup
    replicate: dist.ProcessGroup | None
    device: torch.device


class Place(NamedTuple):
    """An attribute of a module that is a parameter; tied parameters have several."""

    module: nn.Module
    name: str

    def put(self, parameter: nn.Parameter) -> None:
        if type(self.module).__setattr__ is nn.Module.__setattr__:
            self.module._parameters[self.name] = parameter
        else:  # nn.RNN and its like keep lists of their parameters up to date
            setattr(self.module, self.name, parameter)


def places_of(module: nn.Module) -> dict[nn.Parameter, list[Place]]:
    """The parameters of ``module`` that belong to no group yet and hold something, with where they stand.

    ValueError: one is also in a group: it is tied to a parameter that was sharded without this one.
    """
    found: dict[nn.Parameter, list[Place]] = {}
    for part_name, part in module.named_modules():
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            if hasattr(parameter, "fsdp_sharded"):
                raise ValueError(
                    f"{part_name}.{name} of {type(module).__name__} is tied to a parameter that an earlier "
                    "fully_shard has sharded: leave both to the call on a module that holds both"
                )
            if not hasattr(parameter, "fsdp") and parameter.numel():
                found.setdefault(parameter, []).append(Place(part, name))
    return found


def by_dtype(places: dict[nn.Parameter, list[Place]]) -> list[dict[nn.Parameter, list[Place]]]:
    """``places``, a dictionary for each dtype: what can travel in one buffer."""
    kinds: dict[torch.dtype, dict[nn.Parameter, list[Place]]] = {}
    for parameter, where in places.items():
        kinds.setdefault(parameter.dtype, {})[parameter] = where
    return list(kinds.values())


def rows_held(rows: int, world: int, rank: int) -> tuple[int, int]:
    """[start, stop) of the rows of ``rank``, as torch.chunk deals them."""
    chunk = -(-rows // world)
    return min(rank * chunk, rows), min((rank + 1) * chunk, rows)


@dataclass(frozen=True)
class Layout:
    """How the parameters of one group lie in the buffers of ``world`` ranks.

    widths: elements of each parameter's padded rows on one rank.
    """

    world: int
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    compute_dtype: torch.dtype
    reduce_dtype: torch.dtype

    @staticmethod
    def of(parameters: Sequence[torch.Tensor], world: int, policy: Any) -> Layout:
        """parameters: of one dtype. policy: a MixedPrecisionPolicy."""
        dtype = parameters[0].dtype
        compute_dtype = policy.param_dtype if dtype.is_floating_point and policy.param_dtype else dtype
        shapes = tuple(parameter.shape for parameter in parameters)
        return Layout(world, shapes, dtype, compute_dtype, policy.reduce_dtype or compute_dtype)

    @cached_property
    def widths(self) -> list[int]:
        return [-(-shape[0] // self.world) * math.prod(shape[1:]) if shape else 1 for shape in self.shapes]

    @property
    def lies_as_gathered(self) -> bool:
        """Whether rank after rank is also parameter after parameter: nothing to rearrange after a gather."""
        return self.world == 1 or len(self.shapes) == 1

    @property
    def sum_dtype(self) -> torch.dtype:
        """What sums of gradients are taken in: the wider of the reduction's and the parameters'."""
        return torch.promote_types(self.reduce_dtype, self.dtype)
