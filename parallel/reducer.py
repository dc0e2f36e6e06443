"""Gradients reduced while backward goes on: the hooks, the order, the end, and what becomes of a bucket.

``Reducer`` is what every scheme needs; ``AllReduced`` leaves the mean with every rank (``data.py``),
``Scattered`` (``shards.py``) each range of it with its owner.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.weak import WeakIdKeyDictionary

from parallel.buckets import Bucket, Slot, assign, kind_of, limits
from parallel.together import waiting_for_others

# Whose hook a parameter has, and its handle.
_HOOKS = WeakIdKeyDictionary()


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
        self.slots = list(slots)
        self.divide_by(self.world_size)
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

    def divide_by(self, ranks: int) -> None:
        """The mean of gradients is over so many ranks."""
        self.divisor = ranks
        # A tensor, since a Python number makes multiplication into ``out`` four times as slow; in float32 for
        # 16-bit gradients too, so that 1/n is not rounded to theirs.
        self.scale = {
            dtype: torch.tensor(1.0 / ranks, dtype=torch.promote_types(dtype.to_real(), torch.float32))
            for dtype in {slot.param.dtype for slot in self.slots}
        }

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
            with waiting_for_others("which parameters they used", self.group):
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
        """Until the bucket is reduced."""
        if bucket.work is None:
            return
        with waiting_for_others(str(bucket), self.group):
            bucket.work.wait()
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


class AllReduced(Reducer):
    """Buckets whose gradients are averaged over the ranks in place.

    The mean is taken as PyTorch takes it: each gradient times 1/n as it enters the bucket, then the sum. That
    is equal to the last bit to PyTorch's, and 16-bit gradients do not overflow in the sum.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, torch.Tensor]],
        group: Any,
        bucket_cap_mb: float | None,
        find_unused: bool,
        as_view: bool,
    ) -> None:
        super().__init__([Slot(name, param) for name, param in named], group, find_unused)
        self.as_view, self._limits, self._settled = as_view, limits(bucket_cap_mb), find_unused
        self.memory = {
            kind: torch.zeros(
                sum(slot.param.numel() for slot in self.slots if kind_of(slot.param) == kind),
                dtype=kind[0],
                device=kind[1],
            )
            for kind in dict.fromkeys(kind_of(slot.param) for slot in self.slots)
        }
        # Modules are registered in about the order of use; backward goes the other way.
        layout = assign([slot.param for slot in self.slots], *self._limits)
        self._lay_out([[self.slots[index] for index in indices] for indices in reversed(layout)])

    def _lay_out(self, slots_of_buckets: list[list[Slot]]) -> None:
        """Buckets as slices of one tensor for each dtype and device, which stays when the layout changes."""
        kept = [(slot, slot.view.clone()) for slot in self.slots if slot.param.grad is slot.view]
        self.buckets = [Bucket(index, slots) for index, slots in enumerate(slots_of_buckets)]
        self.flats = []
        used = dict.fromkeys(self.memory, 0)
        for bucket in self.buckets:
            kind = kind_of(bucket.slots[0].param)
            flat = self.memory[kind][used[kind] : used[kind] + bucket.elements]
            used[kind] += bucket.elements
            self.flats.append(flat)
            for slot in bucket.slots:
                slot.view = shaped_as(slot.param, flat, slot.offset)
        for slot, gradient in kept:
            slot.param.grad = slot.view.copy_(gradient)

    def settle(self) -> None:
        """Once, after the first backward: buckets in the order in which rank 0's gradients arrived.

        The order of registration is a guess; a bucket that waits for one late gradient delays all behind it.
        """
        if self._settled or len(self.order) < len(self.slots):
            return
        self._settled = True
        number = {slot: index for index, slot in enumerate(self.slots)}
        order = torch.tensor([number[slot] for slot in self.order], device=self.slots[0].param.device)
        with waiting_for_others("the order of rank 0's gradients", self.group):
            dist.broadcast(order, dist.get_process_group_ranks(self.group)[0], group=self.group)
        arrived = [self.slots[index] for index in order.tolist()]
        layout = [[arrived[index] for index in i] for i in assign([s.param for s in arrived], *self._limits)]
        if layout != [bucket.slots for bucket in self.buckets]:
            self._lay_out(layout)

    def _store(self, slot: Slot, gradient: torch.Tensor) -> None:
        if gradient is slot.view:
            gradient.div_(self.divisor)
            return
        # Now, while the gradient is still in the cache.
        torch.mul(gradient, self.scale[gradient.dtype], out=slot.view)
        if self.as_view:
            slot.param.grad = slot.view

    def _store_missing(self, slot: Slot) -> None:
        slot.view.zero_()

    def _launch(self, bucket: Bucket) -> Any:
        flat = self.flats[bucket.index]
        return dist.all_reduce(flat, group=self.group, async_op=True) if bucket.elements else None

    def _finish(self, bucket: Bucket) -> None:
        for slot in bucket.slots:
            gradient = slot.param.grad
            if gradient is slot.view or not slot.used:
                continue
            if self.as_view:
                slot.param.grad = slot.view
            elif gradient is None:
                slot.param.grad = slot.view.clone()
            else:
                gradient.copy_(slot.view)

    def _incomplete(self) -> None:
        names = self.missing()
        self.reset()
        if len(names) < len(self.slots):  # else it was autograd.grad for something else than parameters
            raise RuntimeError(
                f"rank {self.rank} of {self.world_size}: backward has ended without gradients for "
                f"{', '.join(names[:5])}{' ...' * (len(names) > 5)} ({len(names)} of {len(self.slots)} "
                "parameters), so that gradients were not averaged; pass find_unused_parameters=True if the "
                "loss need not depend on every parameter"
            )


def shaped_as(param: torch.Tensor, flat: torch.Tensor, offset: int) -> torch.Tensor:
    """A view with the param's shape, and its strides where it has no gaps, as autograd would lay its
    gradient."""
    if torch.ops.aten.is_non_overlapping_and_dense(param):
        return flat.as_strided(param.shape, param.stride(), flat.storage_offset() + offset)
    return flat[offset : offset + param.numel()].view(param.shape)
