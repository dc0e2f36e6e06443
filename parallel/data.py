"""Data parallelism: the same module on every rank, a batch for each, and the mean of their gradients.

``DistributedDataParallel`` is PyTorch's from scratch (Li et al., VLDB 2020): parameters and buffers start as
rank 0's; backward's hooks fill buckets, each is all-reduced while backward goes on, and gradients are views
of the buckets, so that nothing is copied afterwards. ``DataParallel`` (``replicas.py``) is what came before
it: replicas as threads of one process.

A step of any rank sends all its gradients once, however many ranks there are: 4 bytes a parameter in float32,
which a ring all-reduce moves 2 (n - 1) / n times. Nothing is saved in memory: parameters, gradients and
optimizer state stand whole on every rank. (``zero.py`` and ``fsdp.py`` shard them.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.utils import _pytree as pytree

from parallel.buckets import bytes_of
from parallel.memory_held import Memory
from parallel.reducer import AllReduced
from parallel.replicas import DataParallel
from parallel.same_module import broadcast_from, synchronise_module
from parallel.together import waiting_for_others

__all__ = [
    "DataParallel",
    "DistributedDataParallel",
    "predict_communication",
    "predict_memory",
    "synchronise_module",
]


def predict_communication(
    module: nn.Module,
    broadcast_buffers: bool = True,
    find_unused_parameters: bool = False,
    *,
    world_size: int = 2,
) -> dict[str, int]:
    """Payload bytes of one step of one rank, of however many backwards it consists (all but one in
    ``no_sync``). Any number of ranks has the same, but one, which has nobody to communicate with.

    all_reduce: the gradients, and 4 bytes a parameter with ``find_unused_parameters``; broadcast: the
        buffers.
    """
    if world_size == 1:
        return {}
    trainable = [param for param in module.parameters() if param.requires_grad]
    payload = {"all_reduce": sum(map(bytes_of, trainable)) + 4 * len(trainable) * find_unused_parameters}
    if broadcast_buffers and (buffers := sum(map(bytes_of, module.buffers()))):
        payload["broadcast"] = buffers
    return payload


def predict_memory(module: nn.Module, gradient_as_bucket_view: bool = True) -> Memory:
    """Bytes that one rank holds between steps, the optimizer's state apart; the same for any number of ranks.

    Without ``gradient_as_bucket_view`` the buckets stand beside the gradients, under ``buffers``, where the
    module's own buffers are counted too.
    """
    gradients = sum(bytes_of(param) for param in module.parameters() if param.requires_grad)
    return Memory(
        parameters=sum(map(bytes_of, module.parameters())),
        gradients=gradients,
        optimizer=0,
        buffers=sum(map(bytes_of, module.buffers())) + (0 if gradient_as_bucket_view else gradients),
    )


class DistributedDataParallel(nn.Module, Joinable):
    """``torch.nn.parallel.DistributedDataParallel``: gradients are the mean over all ranks after backward().

    module: the same on every rank; a loss that is a mean over the rank's batch gives the gradient of the
        whole batch where batches are equal. Parameters are not to be added or unfrozen afterwards.
    device_ids: None, or the one device that holds the module, to which inputs are then moved.
    broadcast_buffers: buffers become rank 0's before each forward that follows a synchronised one.
    init_sync: parameters and buffers become rank 0's now. False: the caller has seen to it.
    bucket_cap_mb: MiB of a bucket; None is 25, the first 1.
    find_unused_parameters: a parameter that backward does not reach counts as zero, and keeps its ``grad``
        where no rank reached it. That is known when backward ends, so its bucket waits until then.
    gradient_as_bucket_view: False copies gradients out of the buckets again, which are then memory on top
        (PyTorch's default).

    Each backward is synchronised unless its forward ran in ``no_sync``. ValueError: modules that differ
    between ranks, sparse gradients. RuntimeError: a parameter without gradient; a gradient that has a graph
    itself; a bucket for which other ranks did not come within the group's time-out.
    """

    def __init__(
        self,
        module: nn.Module,
        device_ids: Sequence[int | str | torch.device] | None = None,
        *,
        broadcast_buffers: bool = True,
        init_sync: bool = True,
        process_group: dist.ProcessGroup | None = None,
        bucket_cap_mb: float | None = None,
        find_unused_parameters: bool = False,
        gradient_as_bucket_view: bool = True,
    ) -> None:
        super().__init__()
        Joinable.__init__(self)
        self.module, self.broadcast_buffers = module, broadcast_buffers
        self.process_group = process_group or dist.group.WORLD
        trainable = _trainable(module)
        self.device = trainable[0][1].device
        self.moves_inputs = device_ids is not None
        if device_ids is not None and [_device(one, self.device) for one in device_ids] != [self.device]:
            raise ValueError(
                f"device_ids is {list(device_ids)}; the module is on {self.device}: one process, one device"
            )
        if dist.get_rank(self.process_group) < 0:
            raise ValueError(f"rank {dist.get_rank()} is not in process_group")
        if init_sync:
            synchronise_module(module, self.process_group)
        self.reducer = AllReduced(
            trainable, self.process_group, bucket_cap_mb, find_unused_parameters, gradient_as_bucket_view
        )
        self.require_backward_grad_sync = True
        self.divide_by_initial_world_size = True
        self.buffers_are_due = True

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The module's output; of a group of ranks, each of which calls this."""
        if torch.is_grad_enabled():
            self.reducer.synchronise = self.require_backward_grad_sync
        synchronise = torch.is_grad_enabled() and self.require_backward_grad_sync
        joined = Join.notify_join_context(self)
        self.reducer.recover()
        self.reducer.settle()
        if self._join_config.enable:
            self.meet(synchronise, has_batch=True)
            if joined is not None:
                joined.wait()
        elif self.buffers_are_due and self.broadcast_buffers:
            broadcast_from(0, list(self.module.buffers()), self.process_group)
        self.buffers_are_due = synchronise
        if self.moves_inputs:
            move = lambda leaf: leaf.to(self.device) if isinstance(leaf, torch.Tensor) else leaf  # noqa: E731
            inputs, kwargs = pytree.tree_map(move, (inputs, kwargs))
        output = self.module(*inputs, **kwargs)
        if synchronise:
            for leaf in pytree.tree_leaves(output):
                if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                    leaf.register_hook(self.reducer.begin)
        return output

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Forwards in here do not synchronise: gradients accumulate on each rank until a backward that
        does."""
        before, self.require_backward_grad_sync = self.require_backward_grad_sync, False
        try:
            yield
        finally:
            self.require_backward_grad_sync = before

    def join(
        self,
        divide_by_initial_world_size: bool = True,
        enable: bool = True,
        throw_on_early_termination: bool = False,
    ) -> Join:
        """Context of a loop in which ranks may have different numbers of batches, as PyTorch's.

        A rank that is through answers the others' collectives with zeros. ``divide_by_initial_world_size``
        False: the mean over those that still have a batch. ``throw_on_early_termination``: RuntimeError on
            all.
        """
        return Join(
            [self],
            enable,
            throw_on_early_termination,
            divide_by_initial_world_size=divide_by_initial_world_size,
        )

    def join_hook(self, **kwargs: Any) -> JoinHook:
        self.divide_by_initial_world_size = kwargs.get("divide_by_initial_world_size", True)
        return _Joined(self)

    @property
    def join_device(self) -> torch.device:
        return self.device

    @property
    def join_process_group(self) -> Any:
        return self.process_group

    def meet(self, synchronise: bool, has_batch: bool) -> bool:
        """In ``join``: agree on whether this step synchronises, over how many ranks, and whose buffers
        count."""
        votes = torch.zeros(self.reducer.world_size + 1, dtype=torch.int64, device=self.device)
        votes[self.reducer.rank], votes[-1] = has_batch, synchronise
        with waiting_for_others("whether they have a batch", self.process_group):
            dist.all_reduce(votes, group=self.process_group)
        *batches, synchronising = votes.tolist()
        if not self.divide_by_initial_world_size:
            self.reducer.divide_by(sum(batches))
        if self.buffers_are_due and self.broadcast_buffers:
            last = max(rank for rank, has_one in enumerate(batches) if has_one)
            broadcast_from(last, list(self.module.buffers()), self.process_group)
        self.buffers_are_due = synchronising > 0
        return self.buffers_are_due


class _Joined(JoinHook):
    """A rank without batches: does what the others' forward and backward need of it."""

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self.ddp = ddp

    def main_hook(self) -> None:
        self.ddp.reducer.settle()
        if self.ddp.meet(synchronise=False, has_batch=False):
            self.ddp.reducer.shadow()

    def post_hook(self, is_last_joiner: bool) -> None:
        group = self.ddp.process_group
        Joinable.__init__(self.ddp)  # the context is over, which torch's leaves switched on
        self.ddp.reducer.divide_by(self.ddp.reducer.world_size)
        last = torch.tensor([dist.get_rank(group) if is_last_joiner else -1], device=self.ddp.device)
        dist.all_reduce(last, op=dist.ReduceOp.MAX, group=group)
        synchronise_module(self.ddp.module, group, int(last))


def _trainable(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    for name, child in module.named_modules():
        if getattr(child, "sparse", False) and isinstance(child, (nn.Embedding, nn.EmbeddingBag)):
            raise ValueError(f"{name} has sparse gradients, which buckets cannot hold; use sparse=False")
    trainable = [(name, param) for name, param in module.named_parameters() if param.requires_grad]
    if not trainable:
        raise ValueError("no parameter of the module requires a gradient: there is nothing to average")
    lazy = [name for name, param in trainable if isinstance(param, nn.parameter.UninitializedParameter)]
    if lazy:
        raise ValueError(f"{lazy[0]} is not initialised yet; run a forward before wrapping the module")
    return trainable


def _device(given: int | str | torch.device, like: torch.device) -> torch.device:
    device = torch.device(like.type, given) if isinstance(given, int) else torch.device(given)
    return torch.device(device.type, like.index) if device.index is None else device
