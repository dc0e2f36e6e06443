"""What is done to a pipeline's gradients once a step: those of shared weights are summed, those of replicas
averaged.

A weight that two stages share (the embedding and the head of a language model) is a parameter on both ranks.
Each backward gives a part of its gradient, and each rank needs the sum, after which both take the same
optimizer step and stay the same (Megatron-LM's "embedding group", Narayanan et al. 2021).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from parallel.buckets import assign, bytes_of, limits
from parallel.same_module import synchronise_module
from parallel.together import waiting_for_others

Shared = dict[int, str]
"""A weight of several stages: its name in each."""
TAG = (1 << 19) + 1


def shared_by(stages: Sequence[nn.Module | None]) -> list[Shared]:
    """The parameters that are the same tensor in several of the stages."""
    found: dict[int, Shared] = {}
    for index, stage in enumerate(stages):
        for name, parameter in stage.named_parameters() if stage is not None else ():
            found.setdefault(id(parameter), {})[index] = name
    return [names for names in found.values() if len(names) > 1]


class SharedGradients:
    """The weights that this rank shares with others of ``group``.

    mine: stages of this rank. ValueError: a name that is no parameter; stages of this rank that have a tensor
    each.
    """

    def __init__(
        self,
        shared: Sequence[Mapping[int, str]],
        mine: Mapping[int, nn.Module],
        placement: Sequence[int],
        group: dist.ProcessGroup,
    ) -> None:
        self._group, self._rank = group, group.rank()
        self._weights: list[tuple[torch.Tensor, list[int], str]] = []
        for names in shared:
            holders = sorted({placement[stage] for stage in names})
            tensors = [_parameter(mine[stage], stage, name) for stage, name in names.items() if stage in mine]
            if any(tensor is not tensors[0] for tensor in tensors):
                stages = " and ".join(f"{names[stage]} of stage {stage}" for stage in names if stage in mine)
                raise ValueError(f"{stages} are shared and on one rank: make them one tensor")
            if tensors and len(holders) > 1:
                what = " = ".join(f"{name} of stage {stage}" for stage, name in sorted(names.items()))
                self._weights.append((tensors[0], holders, what))

    @torch.no_grad()
    def make_equal(self) -> None:
        """Every holder's value becomes that of the holder of lowest rank."""
        for weight, holders, what in self._weights:
            if self._rank == holders[0]:
                values = [weight.detach().contiguous()] * (len(holders) - 1)
                self._run([(other, None, one) for other, one in zip(holders[1:], values, strict=True)], what)
            else:
                value = torch.empty_like(weight, memory_format=torch.contiguous_format)
                self._run([(holders[0], value, None)], what)
                weight.copy_(value)

    @torch.no_grad()
    def sum(self) -> None:
        """Each holder's ``grad`` becomes the sum of all, added in the order of ranks: everywhere the same."""
        for weight, holders, what in self._weights:
            if not weight.requires_grad:
                continue
            own = torch.zeros_like(weight) if weight.grad is None else weight.grad.contiguous()
            parts = {rank: torch.empty_like(own) for rank in holders}
            parts[self._rank] = own
            self._run([(rank, parts[rank], own) for rank in holders if rank != self._rank], what)
            total = parts[holders[0]].clone()
            for rank in holders[1:]:
                total += parts[rank]
            if weight.grad is None:
                weight.grad = total
            else:
                weight.grad.copy_(total)

    def _run(self, messages: list[tuple[int, torch.Tensor | None, torch.Tensor | None]], what: str) -> None:
        """Messages of (other rank, to be received, to be sent), all at the same time. On NCCL one call."""
        calls = [
            dist.P2POp(kind, tensor, group=self._group, tag=TAG, group_peer=rank)
            for rank, *both in messages
            for kind, tensor in zip((dist.irecv, dist.isend), both, strict=True)
            if tensor is not None
        ]
        with waiting_for_others(what, self._group):
            for work in dist.batch_isend_irecv(calls):
                work.wait()

    def predict_communication(self) -> dict[str, int]:
        """Payload bytes that this rank sends in each step."""
        size = sum(bytes_of(one) * (len(ranks) - 1) for one, ranks, _ in self._weights if one.requires_grad)
        return {"send": size} if size else {}


def _parameter(module: nn.Module, stage: int, name: str) -> torch.Tensor:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    if name not in parameters:
        raise ValueError(f"stage {stage} has no parameter {name!r} to share; it has {', '.join(parameters)}")
    return parameters[name]


class AveragedGradients:
    """The gradients of ``module``, which is on every rank of ``replicas``, averaged over them.

    Parameters and buffers become the first replica's. ValueError on every replica: modules that differ.
    """

    def __init__(self, module: nn.Module, replicas: dist.ProcessGroup) -> None:
        synchronise_module(module, replicas)
        self._replicas = replicas
        self._parameters = [one for one in module.parameters() if one.requires_grad]
        self._buckets = assign(self._parameters, *limits(None))

    @torch.no_grad()
    def average(self) -> None:
        """A parameter without gradient counts as one of zeros, and gets the average."""
        under_way: list[tuple[list[torch.Tensor], torch.Tensor, Any]] = []
        for indices in self._buckets:
            parameters = [self._parameters[index] for index in indices]
            for one in parameters:
                if one.grad is None:
                    one.grad = torch.zeros_like(one)
            flat = torch.cat([one.grad.reshape(-1) for one in parameters])
            under_way.append((parameters, flat, dist.all_reduce(flat, group=self._replicas, async_op=True)))
        for parameters, flat, work in under_way:
            with waiting_for_others("their gradients", self._replicas):
                work.wait()
            flat /= self._replicas.size()
            for one, part in zip(parameters, flat.split([one.numel() for one in parameters]), strict=True):
                one.grad.copy_(part.view_as(one))

    def predict_communication(self) -> dict[str, int]:
        """Payload bytes of each step."""
        size = sum(map(bytes_of, self._parameters))
        return {"all_reduce": size} if size and self._replicas.size() > 1 else {}
