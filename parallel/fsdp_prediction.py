"""What a step under ``fully_shard`` communicates and holds, from the plain modules (meta device too).

``units`` are the modules that ``fully_shard`` is called on, in the order of the calls: the root is the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn

from parallel.fsdp_layout import Layout, MixedPrecisionPolicy, Place, by_dtype, places_of, rows_held
from parallel.memory_held import Memory


class Planned(NamedTuple):
    """A group before it exists."""

    layout: Layout
    parameters: list[nn.Parameter]
    places: list[list[Place]]

    def bytes_gathered(self) -> int:
        return self.layout.world * self.bytes_cast()

    def bytes_cast(self) -> int:
        return sum(self.layout.widths) * self.layout.compute_dtype.itemsize

    def reduced(self) -> int:
        """Elements of one rank's part of the gradients, with the count of ranks that have each."""
        widths = zip(self.parameters, self.layout.widths, strict=True)
        return sum(width + 1 for parameter, width in widths if parameter.requires_grad)


def planned(units: Sequence[nn.Module], world_size: int, policy: Any) -> list[list[Planned]]:
    """The groups of each unit."""
    taken: set[nn.Parameter] = set()
    plans = []
    for unit in units:
        own = {p: places for p, places in places_of(unit).items() if p not in taken}
        taken |= own.keys()
        plans.append(
            [
                Planned(Layout.of(list(group), world_size, policy), list(group), list(group.values()))
                for group in by_dtype(own)
            ]
        )
    left = [name for name, p in units[-1].named_parameters() if p not in taken and p.numel()]
    if left or len(units) != sum(unit in units for unit in units[-1].modules()):
        raise ValueError("units are submodules of the last, the root, each once")
    return plans


def _each(reshard_after_forward: bool | Sequence[bool], units: Sequence[nn.Module]) -> Sequence[bool]:
    if isinstance(reshard_after_forward, bool):
        return [reshard_after_forward] * len(units)
    if len(reshard_after_forward) != len(units):
        raise ValueError(f"reshard_after_forward: {len(reshard_after_forward)} values for {len(units)} units")
    return reshard_after_forward


def predict_communication(
    units: Sequence[nn.Module],
    world_size: int,
    *,
    replicas: int = 1,
    reshard_after_forward: bool | Sequence[bool] = True,
    mp_policy: Any = None,
    backwards: int = 1,
    backend: str = "gloo",
) -> dict[str, int]:
    """Payload bytes of one step of one rank.

    world_size: ranks that split parameters. replicas: how often (HSDP). reshard_after_forward: one value,
    or one for each unit. backwards: of a step, all but the last without gradient synchronisation. Prefetching
    moves gathers, and changes no bytes.

    all_gather: the padded parameters in param_dtype, for forward and, where they were freed, for backward.
    all_to_all (reduce_scatter with backend nccl): the padded gradients in reduce_dtype and a number for
    each parameter. all_reduce (HSDP): one rank's part of these. Over a dimension of one rank: nothing.
    """
    payload = {"all_gather": 0, "reduce_scatter" if backend == "nccl" else "all_to_all": 0}
    reduction = list(payload)[1]
    plans = planned(units, world_size, mp_policy or MixedPrecisionPolicy())
    for groups, reshards in zip(plans, _each(reshard_after_forward, units), strict=True):
        for group in groups:
            part = group.reduced() * group.layout.reduce_dtype.itemsize
            if world_size > 1:
                payload["all_gather"] += group.bytes_gathered() * (1 + reshards) * backwards
                payload[reduction] += world_size * part
            if replicas > 1:
                payload["all_reduce"] = payload.get("all_reduce", 0) + part
    return {name: count for name, count in payload.items() if count}


def predict_memory(
    units: Sequence[nn.Module],
    world_size: int,
    *,
    rank: int = 0,
    replicas: int = 1,
    reshard_after_forward: bool | Sequence[bool] = True,
    mp_policy: Any = None,
    optimizer_tensors: int = 2,
    optimizer_scalars: int = 1,
    prefetch: bool = True,
    backend: str = "gloo",
) -> Memory:
    """Bytes that ``rank`` of those that split the parameters holds, activations apart.

    optimizer_tensors, optimizer_scalars: the optimizer's state of a parameter, as large as its shard and as
    single float32 numbers: (2, 1) for AdamW, (0, 0) for SGD. buffers: what a step needs at its peak besides
    parameters, gradients and state, for one backward a step: gathered parameters (of the unit that runs and,
    with ``prefetch``, of the next), whole gradients, gradients on their way. Units run in the order in which
    they are registered.

    Backend "shm" (and "nccl") takes no memory of torch's itself, and the peak is this in every step. "gloo"
    gathers into a tensor of its own and copies: counted here from the gather to the wait, for which it lives
    where transfers are slower than compute; where they are over at once the peak is that of "shm", and while
    a thread of gloo's is late to let go of what has arrived it is higher.
    """
    policy = mp_policy or MixedPrecisionPolicy()
    plans = planned(units, world_size, policy)
    groups = [group for plan in plans for group in plan]
    parameters = sum(sum(group.layout.widths) * group.layout.dtype.itemsize for group in groups)
    gradients = sum(group.reduced() * group.layout.dtype.itemsize for group in groups)
    state = 0
    for group in groups:
        for parameter in group.parameters:
            if parameter.requires_grad:
                first, last = rows_held(parameter.shape[0] if parameter.dim() else 1, world_size, rank)
                held = (last - first) * math.prod(parameter.shape[1:])
                state += optimizer_tensors * held * group.layout.dtype.itemsize + 4 * optimizer_scalars
    step = _Step(units, plans, _each(reshard_after_forward, units), replicas, prefetch, backend)
    return Memory(parameters, gradients, state, step.peak() - gradients)


class _Step:
    """A step's allocations, in the order in which ``fsdp_runtime`` makes them."""

    def __init__(
        self,
        units: Sequence[nn.Module],
        plans: list[list[Planned]],
        reshards: Sequence[bool],
        replicas: int,
        prefetch: bool,
        backend: str,
    ) -> None:
        self.plans = dict(zip(units, plans, strict=True))
        self.reshards = dict(zip(units, reshards, strict=True))
        self.replicas, self.prefetch, self.backend = replicas, prefetch, backend
        self.root = units[-1]
        self.started = [module for module in self.root.modules() if module in self.plans]
        self.live: dict[Any, int] = {}
        self.most = 0
        self.reductions: list[Planned] = []
        self.across: set[int] = set()  # of these, those that are reduced over replicas

    def hold(self, what: Any, bytes_held: int) -> None:
        self.live[what] = self.live.get(what, 0) + bytes_held
        self.most = max(self.most, sum(self.live.values()))

    def free(self, what: Any) -> None:
        self.live.pop(what, None)

    def pass_on(self, what: Any, bytes_held: int) -> None:
        """Hold it for an instant."""
        self.hold(what, bytes_held)
        self.free(what)

    def rename(self, what: Any, new: Any) -> None:
        """The same memory in another role."""
        self.live[new] = self.live.get(new, 0) + self.live.pop(what)

    def peak(self) -> int:
        """The most bytes live at once."""
        finished: list[nn.Module] = []
        self.forward(self.root, finished)
        self.backward(self.root, finished)
        while self.reductions:
            self.advance()
        return self.most

    def gather(self, unit: nn.Module) -> None:
        for group in self.plans[unit]:
            key, layout = id(group), group.layout
            if ("whole", key) in self.live or ("gathered", key) in self.live:
                continue
            self.hold(("source", key), group.bytes_cast() if layout.compute_dtype is not layout.dtype else 0)
            self.hold(("gathered", key), group.bytes_gathered())
            self.hold(("transport", key), group.bytes_gathered() if self.backend == "gloo" else 0)

    def wait(self, unit: nn.Module) -> None:
        self.gather(unit)
        for group in self.plans[unit]:
            key = id(group)
            if ("gathered", key) in self.live:
                self.free(("source", key))
                self.free(("transport", key))
                if group.layout.lies_as_gathered:
                    self.rename(("gathered", key), ("whole", key))
                else:
                    self.hold(("whole", key), group.bytes_gathered())
                    self.free(("gathered", key))

    def reshard(self, unit: nn.Module) -> None:
        for group in self.plans[unit]:
            self.free(("whole", id(group)))

    def below(self, unit: nn.Module, module: nn.Module | None = None) -> Iterator[nn.Module]:
        """The modules of ``unit`` that belong to no unit below it, and those units, in order."""
        for child in [unit] if module is None else module.children():
            if child is not unit and child in self.plans:
                yield child
                continue
            yield child
            yield from self.below(unit, child)

    def forward(self, unit: nn.Module, finished: list[nn.Module]) -> None:
        index = self.started.index(unit)
        self.wait(unit)
        if self.prefetch and index + 1 < len(self.started):
            self.gather(self.started[index + 1])
        for module in self.below(unit):
            if module is not unit and module in self.plans:
                self.forward(module, finished)
        finished.append(unit)
        if self.reshards[unit]:
            self.reshard(unit)

    def backward(self, unit: nn.Module, finished: list[nn.Module]) -> None:
        index = finished.index(unit)
        self.wait(unit)
        if self.prefetch and index:
            self.gather(finished[index - 1])
        had: set[nn.Parameter] = set()
        for module in reversed(list(self.below(unit))):
            if module is not unit and module in self.plans:
                self.backward(module, finished)
                continue
            for group in self.plans[unit]:
                for parameter, places in zip(group.parameters, group.places, strict=True):
                    if parameter.requires_grad and any(place.module is module for place in places):
                        size = parameter.numel() * group.layout.compute_dtype.itemsize
                        if parameter in had:  # autograd adds the second gradient to the first into a third
                            self.pass_on("second of tied", 2 * size)
                        else:
                            self.hold(("gradient", id(group)), size)
                        had.add(parameter)
        self.reshard(unit)
        for group in self.plans[unit]:
            if group.reduced():
                self.advance()
                self.reduce(group)

    def reduce(self, group: Planned) -> None:
        layout, key = group.layout, id(group)
        part = group.reduced() * layout.reduce_dtype.itemsize
        self.hold(("sent", key), layout.world * part)
        if self.backend != "nccl":  # on CPU, torch._chunk_cat pads and casts what it joins
            trainable = [
                (parameter.shape[0] if parameter.dim() else 1, width)
                for parameter, width in zip(group.parameters, layout.widths, strict=True)
                if parameter.requires_grad
            ]
            padded = sum(width for rows, width in trainable if rows % layout.world)
            padded += max(width for _, width in trainable) * (layout.compute_dtype is not layout.reduce_dtype)
            self.pass_on("padded", layout.world * padded * layout.compute_dtype.itemsize)
        self.free(("gradient", key))
        self.hold(("received", key), part * (1 if self.backend == "nccl" else layout.world))
        self.reductions.append(group)

    def advance(self) -> None:
        waiting, self.reductions = self.reductions, []
        for group in waiting:
            layout, key, elements = group.layout, id(group), group.reduced()
            same = layout.reduce_dtype is layout.sum_dtype
            size = elements * layout.sum_dtype.itemsize
            if key not in self.across:
                self.free(("sent", key))
                self.add(group, size)
                if self.replicas > 1:
                    self.hold(("across", key), 0 if same else elements * layout.reduce_dtype.itemsize)
                    if not same:
                        self.free(("sum", key))
                    self.across.add(key)
                    self.reductions.append(group)
                    continue
            elif not same:
                self.hold(("sum", key), size)
            self.free(("across", key))
            if layout.sum_dtype is not layout.dtype:
                self.hold("gradients", elements * layout.dtype.itemsize)
                self.free(("sum", key))
            else:
                self.rename(("sum", key), "gradients")

    def add(self, group: Planned, size: int) -> None:
        """What was received becomes the sum."""
        layout, key = group.layout, id(group)
        same = layout.reduce_dtype is layout.sum_dtype
        if same and (layout.world == 1 or self.backend == "nccl"):
            self.rename(("received", key), ("sum", key))
            return
        self.hold(("sum", key), size)
        if not same and self.backend != "nccl" and layout.world > 1:
            self.pass_on("in the wider dtype", size)  # addition casts on CPU what it adds
        self.free(("received", key))
