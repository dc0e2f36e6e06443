"""One communication group of ``fully_shard``: its shards, their all-gather, the reduction of its gradients.

Every parameter is split along its first dimension as ``torch.chunk`` deals rows, which is also FSDP2's
``Shard(0)``: rank r of W holds rows [r c, (r + 1) c) of n, c = ceil(n / W), so that the last ranks may hold
fewer rows or none. A rank's shards lie in one flat buffer, each padded to c rows: the buffer is what the
all-gather sends, and an optimizer that steps on the shards writes it.

Gradients are averaged over ranks. On CPU they go to the rank that holds the rows by all-to-all, and are added
there in the order of ranks: every world and backend gives the same bits, and gloo takes half the time of its
reduce-scatter, which all-reduces everything and keeps a part. On other devices it is a reduce-scatter.
The bytes are the same. Beside the gradients goes one number for each parameter, which counts the ranks where
backward reached it: a gradient that no rank has stays None, and one that a rank lacks is zero there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from parallel.fsdp_layout import Layout, Mesh, Place, rows_held

# torch 2.13's names; before, the same functions were called otherwise.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Member:
    """One parameter of a group; at its places is registered ``shard``, or ``whole`` while gathered."""

    def __init__(self, original: nn.Parameter, places: list[Place], group: Group) -> None:
        self.places, self.group, self.shape = places, group, original.shape
        world, rank = group.world, dist.get_rank(group.mesh.shard)
        self.width = group.layout.widths[len(group.members)]
        rows = self.shape[0] if self.shape else 1
        self.start, self.stop = rows_held(rows, world, rank)
        self.shard_shape = (self.stop - self.start, *self.shape[1:])
        self.gradient: torch.Tensor | None = None  # of steps that were not reduced, in the reduction's dtype

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a tensor of the parameter's shape: a view."""
        return (whole if self.shape else whole.view(1))[self.start : self.stop]

    def gather(self, shard: torch.Tensor) -> torch.Tensor:
        """The tensor of the parameter's shape of which every rank gives its shard (all-gather)."""
        mesh = self.group.mesh
        padded = torch.zeros(self.width, dtype=shard.dtype, device=mesh.device)
        padded[: shard.numel()].copy_(shard.detach().reshape(-1))
        whole = torch.empty(self.width * self.group.world, dtype=shard.dtype, device=mesh.device)
        all_gather_single(whole, padded, group=mesh.shard)
        return whole[: self.shape.numel()].view(self.shape).to(shard.device)

    def make(self, original: nn.Parameter, shard: torch.Tensor, whole: torch.Tensor) -> None:
        """The two parameters, with what was hung on the original: attributes, hooks on its gradient."""
        self.shard, self.whole = (nn.Parameter(data, original.requires_grad) for data in (shard, whole))
        for parameter in (self.shard, self.whole):
            vars(parameter).update(vars(original), fsdp=self)
        for hook in (original._backward_hooks or {}).values():
            self.whole.register_hook(hook)
        for hook in (getattr(original, "_post_accumulate_grad_hooks", None) or {}).values():
            self.shard.register_post_accumulate_grad_hook(hook)
        self.address = self.shard.data_ptr()

    def take_gradient(self) -> torch.Tensor | None:
        """What backward has left since the last reduction, which is then ours to free."""
        self.keep_gradient()
        gradient, self.gradient = self.gradient, None
        return gradient

    def keep_gradient(self) -> None:
        """Add the gradient of this backward to those that wait for a reduction."""
        gradient, self.whole.grad = self.whole.grad, None
        if gradient is None:
            return
        if self.gradient is None:
            self.gradient = gradient
        else:
            self.gradient = self.gradient.to(self.group.layout.reduce_dtype).add_(gradient)

    def refresh(self, flat: torch.Tensor) -> None:
        """Take over what was put in the shard's place since (``.data``, load_state_dict(assign=True))."""
        found = self.places[0].module._parameters[self.places[0].name]
        if found is self.shard and (self.address == found.data_ptr() or not found.numel()):
            return
        if found is None or (found.shape, found.dtype, found.device) != (
            self.shard_shape,
            flat.dtype,
            flat.device,
        ):
            raise ValueError(
                f"{self.places[0].name} of {type(self.places[0].module).__name__} was replaced after "
                f"fully_shard by what is not a shard of {flat.dtype} on {flat.device}; change dtype and "
                "device before"
            )
        values, self.shard = found.detach(), found
        found.data = flat[: values.numel()].view(self.shard_shape).copy_(values)
        vars(found).update(fsdp=self)
        self.address = found.data_ptr()
        for place in self.places:
            place.put(found)


class Group:
    """Parameters of one dtype that are gathered in one all-gather and whose gradients are reduced in one."""

    def __init__(
        self, originals: dict[nn.Parameter, list[Place]], mesh: Mesh, policy: Any, offload: Any
    ) -> None:
        self.mesh, self.world = mesh, mesh.shard.size()
        self.ranks = self.world * (mesh.replicate.size() if mesh.replicate else 1)
        self.layout = Layout.of(list(originals), self.world, policy)
        self.members: list[Member] = []
        for original, places in originals.items():
            self.members.append(Member(original, places, self))
        self.starts = [0, *accumulate(self.layout.widths)]
        pin = getattr(offload, "pin_memory", False) and mesh.device.type != "cpu"
        home = mesh.device if offload is None else torch.device("cpu")
        self.flat = torch.zeros(self.starts[-1], dtype=self.layout.dtype, device=home, pin_memory=pin)
        dtype = self.layout.compute_dtype
        full = torch.empty(self.world * self.starts[-1], dtype=dtype, device=mesh.device)
        self.full, self.nbytes = full.untyped_storage(), full.untyped_storage().nbytes()
        # What is gathered is written through aliases with a version counter of their own: to autograd, the
        # tensors that it saved in forward are what they were.
        self.written = full.data
        self.parts = [
            part.view(self.world, -1)
            for part in full.data.split([self.world * width for width in self.layout.widths])
        ]
        for member, original, start in zip(self.members, originals, self.starts, strict=False):
            shard = self.flat[start : start + math.prod(member.shard_shape)].view(member.shard_shape)
            whole = full[self.world * start :][: member.shape.numel()].view(member.shape)
            shard.copy_(member.take(self._of_first_rank(original.detach())))
            member.make(original, shard, whole)
        self.full.resize_(0)
        self.source: torch.Tensor | None = None
        self.gathered: torch.Tensor | None = None
        self.work: Any = None
        self.sharded = True
        self._flags: dict[tuple[tuple[bool, ...], torch.dtype], torch.Tensor] = {}
        self._install()

    def _of_first_rank(self, values: torch.Tensor) -> torch.Tensor:
        values = values.to(self.mesh.device).contiguous()
        for group in (self.mesh.replicate, self.mesh.shard):
            if group is not None:
                dist.broadcast(values, dist.get_process_group_ranks(group)[0], group=group)
        return values

    def _install(self) -> None:
        for member in self.members:
            parameter = member.shard if self.sharded else member.whole
            for place in member.places:
                place.put(parameter)

    def refresh(self) -> None:
        for member, start in zip(self.members, self.starts, strict=False):
            member.refresh(self.flat[start:])

    @torch.no_grad()
    def gather(self) -> None:
        """Start the all-gather, if the group is sharded and it has not been started."""
        if not self.sharded or self.work is not None:
            return
        # Kept until the wait, though the backend may be done with it before: what is held at the peak is then
        # the same whenever a transfer ends.
        self.source = self.flat.to(self.mesh.device, self.layout.compute_dtype, non_blocking=True)
        if self.layout.lies_as_gathered:
            self.full.resize_(self.nbytes)
            self.gathered = self.written
        else:
            self.gathered = self.source.new_empty(self.world * self.source.numel())
        self.work = all_gather_single(self.gathered, self.source, group=self.mesh.shard, async_op=True)

    @torch.no_grad()
    def wait(self) -> None:
        """Wait for the all-gather and register the whole parameters."""
        if self.work is None:
            return
        self.work.wait()
        self.work = self.source = None
        if not self.layout.lies_as_gathered:
            self.full.resize_(self.nbytes)
            rows = self.gathered.view(self.world, -1)  # type: ignore[union-attr]
            torch.split_with_sizes_copy(rows, self.layout.widths, dim=1, out=self.parts)
            del rows
        self.gathered = None
        self.sharded = False
        for member in self.members:
            if member.whole.requires_grad != member.shard.requires_grad:
                member.whole.requires_grad_(member.shard.requires_grad)
        self._install()

    def reshard(self) -> None:
        """Free the whole parameters and register the shards; a gather in flight is waited for and dropped."""
        if self.work is not None:
            self.work.wait()
            self.work = self.source = self.gathered = None
        elif self.sharded:
            return
        self.full.resize_(0)
        self.sharded = True
        self._install()

    def keep_gradients(self) -> None:
        """Instead of a reduction: gradients stay whole on every rank, summed in the reduction's dtype."""
        for member in self.members:
            member.keep_gradient()
            if member.gradient is not None:
                member.gradient = member.gradient.to(self.layout.reduce_dtype)

    def flags(self, used: tuple[bool, ...], dtype: torch.dtype) -> torch.Tensor:
        """(world, parameters): the same row to every rank, 1 where this rank has a gradient."""
        if (used, dtype) not in self._flags:
            row = torch.tensor(used, dtype=dtype, device=self.mesh.device)
            self._flags[used, dtype] = row.expand(self.world, -1)
        return self._flags[used, dtype]


class Reduction:
    """The gradients of a group on their way to its shards: ``advance`` until they have arrived."""

    @torch.no_grad()
    def __init__(self, group: Group) -> None:
        """Start it; the whole gradients are freed."""
        self.group, layout, mesh = group, group.layout, group.mesh
        self.members = [member for member in group.members if member.shard.requires_grad]
        gradients = [member.take_gradient() for member in self.members]
        self.used = tuple(gradient is not None for gradient in gradients)
        waited = any(
            gradient is not None and gradient.dtype is not layout.compute_dtype for gradient in gradients
        )
        dtype = layout.reduce_dtype if waited else layout.compute_dtype
        zero = torch.zeros(1, dtype=dtype, device=mesh.device)
        rows = [
            (zero.expand(member.shape) if gradient is None else gradient)
            .reshape(member.shape or (1,))
            .to(dtype)
            for member, gradient in zip(self.members, gradients, strict=True)
        ]
        width = sum(member.width for member in self.members) + len(rows)
        sent = torch.empty(group.world, width, dtype=layout.reduce_dtype, device=mesh.device)
        torch._chunk_cat([*rows, group.flags(self.used, dtype)], dim=0, num_chunks=group.world, out=sent)
        del gradients, rows
        if self.divisor_before > 1:
            sent.div_(self.divisor_before)
        self.received: torch.Tensor | None
        self.work: Any
        if mesh.device.type == "cpu":
            self.received = torch.empty_like(sent)
            self.work = dist.all_to_all_single(self.received, sent, group=mesh.shard, async_op=True)
        else:
            self.received = sent.new_empty(1, width)
            self.work = reduce_scatter_single(self.received[0], sent, group=mesh.shard, async_op=True)
        self.sent: torch.Tensor | None = sent  # until it has arrived, whenever the backend lets go of it
        self.across = mesh.replicate
        self.total: torch.Tensor | None = None

    @property
    def divisor_before(self) -> int:
        """float16 overflows: divide by about the square root of the ranks before, by the rest after."""
        if self.group.layout.reduce_dtype is not torch.float16:
            return 1
        return 2 ** math.ceil(math.log2(self.group.ranks) / 2)

    @torch.no_grad()
    def advance(self) -> bool:
        """Wait for what is under way; True: the gradients are there."""
        self.work.wait()
        self.work = self.sent = None
        if self.total is None:
            self.total = self._added()
        if self.across is not None:
            self.total = self.total.to(self.group.layout.reduce_dtype)
            self.work = dist.all_reduce(self.total, group=self.across, async_op=True)
            self.across = None
            return False
        self._assign()
        return True

    def _added(self) -> torch.Tensor:
        """The sum in the order of ranks."""
        assert self.received is not None
        (first, *rest), self.received = self.received.unbind(), None
        total = first.to(self.group.layout.sum_dtype)
        for received in rest:  # into a tensor of its own: ``first`` is a part of all that was received
            total = torch.add(total, received) if total is first else total.add_(received)
        return total

    def _assign(self) -> None:
        """Average, and give every shard its gradient in its dtype and place, added to one that is there."""
        group, layout = self.group, self.group.layout
        assert self.total is not None
        total = self.total.to(layout.sum_dtype).div_(group.ranks / self.divisor_before)
        total, self.total = total.to(layout.dtype), None
        used: Sequence[bool] = self.used
        if not all(used):
            used = (total[-len(used) :] > 0).tolist()
        total = total.to(group.flat.device)
        start = 0
        for member, reached in zip(self.members, used, strict=True):
            if reached:
                shape = member.shard_shape
                gradient = total[start : start + math.prod(shape)].view(shape)
                if member.shard.grad is None:
                    member.shard.grad = gradient
                else:
                    member.shard.grad.add_(gradient)
                for hook in (getattr(member.shard, "_post_accumulate_grad_hooks", None) or {}).values():
                    hook(member.shard)
            start += member.width
