"""Buckets: gradients that travel together while backward still computes the others.

One collective for each parameter would pay the latency of the link hundreds of times; one for all of them
could start only when backward has ended. Between the two lie buckets of some megabytes, filled in the reverse
order of use, each sent as soon as its last gradient is there (Li et al., "PyTorch Distributed: Experiences on
Accelerating Data Parallel Training", VLDB 2020, section 3.2). ``Reducer`` holds what every such scheme needs:
the hooks, the order, the end of backward. ``data.py`` derives all-reduced buckets from it, ``zero.py``
scattered ones.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.weak import WeakIdKeyDictionary

MEBIBYTE = 1 << 20
CAP_MB, FIRST_BYTES = 25.0, MEBIBYTE  # torch's: a small first bucket lets communication begin early


def bytes_of(tensor: torch.Tensor) -> int:
    """Bytes of the elements of a tensor."""
    return tensor.numel() * tensor.element_size()


def limits(bucket_cap_mb: float | None) -> tuple[int, int]:
    """(bytes of the first bucket, bytes of the others). None: 1 MiB and 25 MiB; else both what is given."""
    if bucket_cap_mb is None:
        return FIRST_BYTES, int(CAP_MB * MEBIBYTE)
    if bucket_cap_mb <= 0:
        raise ValueError(f"bucket_cap_mb is {bucket_cap_mb}; it must be above 0 (MiB)")
    return int(bucket_cap_mb * MEBIBYTE), int(bucket_cap_mb * MEBIBYTE)


def assign(tensors: Sequence[torch.Tensor], first_bytes: int, cap_bytes: int) -> list[list[int]]:
    """Indices of the tensors of each bucket: filled in the order given until it holds the limit or more.

    A bucket has one dtype and device. (What torch.distributed._compute_bucket_assignment_by_size returns.)
    """
    closed: list[list[int]] = []
    open_: dict[tuple[torch.dtype, torch.device], tuple[list[int], int]] = {}
    limit: dict[tuple[torch.dtype, torch.device], int] = {}
    for index, tensor in enumerate(tensors):
        kind = tensor.dtype, tensor.device
        indices, filled = open_.pop(kind, ([], 0))
        indices.append(index)
        filled += bytes_of(tensor)
        if filled >= limit.setdefault(kind, first_bytes):
            closed.append(indices)
            limit[kind] = cap_bytes
        else:
            open_[kind] = indices, filled
    return sorted(closed + [indices for indices, _ in open_.values()])


def verify_same(what: str, tensors: Sequence[tuple[str, torch.Tensor]], group: Any) -> None:
    """ValueError, the same on every rank, unless all ranks have these (name, tensor) alike."""
    mine = [
        (name, tuple(t.shape), str(t.dtype).removeprefix("torch."), t.requires_grad) for name, t in tensors
    ]
    all_: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(all_, mine, group=group)
    for rank, theirs in enumerate(all_):
        if len(theirs) != len(all_[0]):
            raise ValueError(
                f"{what} differ between ranks: {len(all_[0])} on rank 0, {len(theirs)} on rank {rank}; "
                "build the same module on every rank"
            )
        for first, other in zip(all_[0], theirs, strict=True):
            if first != other:
                raise ValueError(
                    f"{what} differ between ranks: {_described(first)} on rank 0, {_described(other)} on "
                    f"rank {rank}; build the same module on every rank"
                )


def _described(fact: tuple[str, tuple[int, ...], str, bool]) -> str:
    name, shape, dtype, trainable = fact
    return f"{name} {dtype} {list(shape)}{'' if trainable else ' (frozen)'}"


def broadcast_from(rank: int, tensors: Sequence[torch.Tensor], group: Any) -> None:
    """Copies of one group rank's tensors into everybody's: together, as bytes, so that a call takes all
    dtypes."""
    source = dist.get_process_group_ranks(group)[rank]
    mine = dist.get_rank(group) == rank
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        together = [t.detach() for t in tensors if t.device == device and t.numel()]
        if not together:
            continue
        flat = torch.empty(sum(map(bytes_of, together)), dtype=torch.uint8, device=device)
        pieces = flat.split([bytes_of(t) for t in together])
        if mine:
            for piece, tensor in zip(pieces, together, strict=True):
                piece.copy_(tensor.contiguous().view(-1).view(torch.uint8))
        dist.broadcast(flat, source, group=group)
        if mine:
            continue
        for piece, tensor in zip(pieces, together, strict=True):
            # A dtype's view wants its own alignment, which a piece behind smaller elements may lack.
            tensor.copy_(piece.clone().view(tensor.dtype).view(tensor.shape))


# Whose hook a parameter has, and its handle.
_HOOKS = WeakIdKeyDictionary()


class Slot:
    """A parameter's place in a bucket."""

    __slots__ = ("bucket", "name", "offset", "param", "ready", "used", "view")

    def __init__(self, name: str, param: torch.Tensor) -> None:
        self.name, self.param = name, param
        self.ready = False  # its gradient is in the bucket
        self.used = True  # by some rank
        self.bucket: Bucket
        self.offset = 0  # elements, in the bucket
        self.view: torch.Tensor  # (param's shape) in the bucket, where it has memory of its own


class Bucket:
    """Gradients that are communicated together, laid one after the other."""

    __slots__ = ("elements", "index", "pending", "slots", "work")

    def __init__(self, index: int, slots: Sequence[Slot]) -> None:
        self.index, self.slots, self.pending = index, list(slots), len(slots)
        self.work: Any = None
        self.elements = 0
        for slot in self.slots:
            slot.bucket, slot.offset = self, self.elements
            self.elements += slot.param.numel()

    def __str__(self) -> str:
        names = " ... ".join(dict.fromkeys((self.slots[0].name, self.slots[-1].name)))
        size = self.elements * self.slots[0].param.element_size()
        return f"gradient bucket {self.index} ({names}, {size} bytes)"


class Reducer:
    """Watches backward through a hook on each parameter and launches buckets in order, each when it is full.

    Every rank launches in the order of the buckets, whatever order gradients arrive in: collectives match by
    order. ``synchronise`` False lets gradients accumulate where autograd puts them.
    A derived class says what is done with a gradient (``_store``), a missing one (``_store_missing``), a full
    bucket (``_launch``, which returns the work) and a reduced one (``_finish``).
    """

    def __init__(self, slots: Sequence[Slot], group: Any, find_unused: bool) -> None:
        self.group, self.find_unused, self.synchronise = group, find_unused, True
        self.world_size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.divisor = self.world_size
        self.slots = list(slots)
        self.buckets: Sequence[Bucket] = []
        self.order: list[Slot] = []  # in which gradients arrived
        self._open, self._next = False, 0
        for slot in self.slots:
            kind, former = _HOOKS.get(slot.param, (type(self), None))
            if kind is not type(self):
                raise ValueError(
                    f"the gradient of {slot.name} is reduced by {kind.__name__} already: either "
                    "DistributedDataParallel averages them or ZeroRedundancyOptimizer(stage=2) scatters them"
                )
            if former is not None:
                former.remove()  # of an earlier wrapper around the same module
            hook = functools.partial(self._arrived, slot)
            _HOOKS[slot.param] = kind, slot.param.register_post_accumulate_grad_hook(hook)

    def begin(self, _gradient: torch.Tensor | None = None) -> None:
        """Backward has started: look after it when it ends. (A hook; more calls during a backward do
        nothing.)"""
        if self.synchronise and not self._open:
            self._open = True
            self.order.clear()
            torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _arrived(self, slot: Slot, param: torch.Tensor) -> None:
        if not self.synchronise:
            return
        if not self._open:
            self.begin()
        if slot.ready:
            raise RuntimeError(
                f"the gradient of {slot.name} was ready twice in one backward: parts of the graph ran "
                "backward again (a module in checkpoint(use_reentrant=True) more than once) or an earlier "
                "backward left others without gradient; use checkpoint(use_reentrant=False) or "
                "find_unused_parameters=True"
            )
        gradient = param.grad
        assert gradient is not None
        if gradient.requires_grad:
            raise RuntimeError(
                f"the gradient of {slot.name} has a graph of its own (create_graph=True), which would not be "
                "synchronised; take inner gradients by torch.autograd.grad(..., create_graph=True) and end "
                "with backward()"
            )
        slot.ready = True
        self.order.append(slot)
        self._store(slot, gradient)
        bucket = slot.bucket
        bucket.pending -= 1
        if not bucket.pending:
            self._launch_full()

    def _launch_full(self) -> None:
        while self._next < len(self.buckets) and not self.buckets[self._next].pending:
            bucket = self.buckets[self._next]
            bucket.work = self._launch(bucket)
            self._next += 1

    def missing(self) -> list[str]:
        """Parameters without gradient, of a backward that has ended with buckets open."""
        return [slot.name for slot in self.slots if not slot.ready] if self._open else []

    def _end(self) -> None:
        if self.find_unused:
            self._fill()
        elif self._next < len(self.buckets):
            self._incomplete()
            return
        self._complete()

    def _fill(self) -> None:
        """Backward did not reach some parameters: launch their buckets all the same."""
        for slot in self.slots:
            if not slot.ready:
                slot.ready = slot.param.grad is not None  # from an earlier backward that was not synchronised
                if slot.ready:
                    self._store(slot, slot.param.grad)
                else:
                    self._store_missing(slot)
                slot.bucket.pending -= 1
        self._launch_full()

    def _complete(self) -> None:
        """All buckets are launched: wait for them and give their gradients to the parameters."""
        if self.find_unused:
            device = self.slots[0].param.device
            users = torch.tensor([slot.ready for slot in self.slots], dtype=torch.int32, device=device)
            dist.all_reduce(users, group=self.group)
            for slot, count in zip(self.slots, users.tolist(), strict=True):
                slot.used = count > 0
        for bucket in self.buckets:
            self.wait(bucket)
            self._finish(bucket)
        self.reset()

    def shadow(self) -> None:
        """The collectives of one backward, with gradients of zero: of a rank that has no batch left."""
        for slot in self.slots:
            slot.param.grad = None
        self.order = list(self.slots)
        self._fill()
        self._complete()

    def wait(self, bucket: Bucket) -> None:
        """Until the bucket is reduced. RuntimeError that says what this rank waited for."""
        if bucket.work is None:
            return
        try:
            bucket.work.wait()
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.world_size} waited in vain for the others with {bucket}: a rank "
                "has died, has fewer batches than the others (see join) or left parameters unused "
                f"(see find_unused_parameters). {error}"
            ) from error
        bucket.work = None

    def recover(self) -> None:
        """Forget a backward that broke off with an error. (In forward; which checkpointing may call in
        backward.)"""
        if self._open and torch._C._current_graph_task_id() == -1:
            self.reset()

    def reset(self) -> None:
        """Ready for the next backward."""
        for bucket in self.buckets:
            self.wait(bucket)
            bucket.pending = len(bucket.slots)
        for slot in self.slots:
            slot.ready = False
        self._open, self._next = False, 0

    def _incomplete(self) -> None:
        """Backward has ended, and parameters are without gradient."""
        raise NotImplementedError

    def _store(self, slot: Slot, gradient: torch.Tensor) -> None:
        raise NotImplementedError

    def _store_missing(self, slot: Slot) -> None:
        raise NotImplementedError

    def _launch(self, bucket: Bucket) -> Any:
        raise NotImplementedError

    def _finish(self, bucket: Bucket) -> None:
        raise NotImplementedError
