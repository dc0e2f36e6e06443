"""When ``fully_shard`` gathers, frees and reduces: the hooks of its modules, and one step of all of them.

    before a module's forward     wait for its parameters, start to gather the next module's
    after it                      free them (reshard_after_forward)
    before its backward           wait for its parameters, start to gather the previous module's
    after it                      free them, start to reduce its gradients; wait for those of the one before

Which module comes next is what the last forward has recorded; in backward, the order of this forward. A guess
that was wrong costs a gather and nothing else. Gradients are reduced in the reverse order of forward on every
rank, whatever order backward finishes in: ranks whose graphs differ then still reduce the same with the same.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from parallel.fsdp_group import Group, Reduction


def in_backward() -> bool:
    """Whether autograd is running: forward within it is a recomputation (activation checkpointing)."""
    return torch._C._current_graph_task_id() != -1


class _AfterBackward(torch.autograd.Function):
    """The identity on a module's inputs; its backward runs when that of the module is over."""

    @staticmethod
    def forward(ctx: Any, unit: Unit, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.unit = unit
        return inputs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.unit.after_backward()
        return None, *gradients


class Step:
    """What the units below one root share: the order they ran in, and the reductions under way."""

    def __init__(self, root: nn.Module) -> None:
        self.units = [unit for module in root.modules() if (unit := unit_of(module)) is not None]
        for unit in self.units:
            unit.step = self
        self.root: Unit | None = None
        self.expected: list[Unit] = []
        self.started: list[Unit] = []
        self.finished: list[Unit] = []
        self.to_reduce: list[Unit] | None = None
        self.reductions: list[Reduction] = []

    def begin(self, root: Unit) -> None:
        """Forward starts at ``root``: parameters are gathered anew, whatever became of the last forward."""
        self.root, self.expected, self.started, self.finished = root, self.started, [], []
        self.to_reduce = None
        while self.reductions:
            self._advance()
        for unit in self.units:
            unit.waits, unit.uses = False, 0
            unit.reshard()
            for group in unit.groups:
                group.refresh()

    def next_of(self, unit: Unit) -> Unit | None:
        """The unit that started after this one in the last forward."""
        index = len(self.started)
        self.started.append(unit)
        if index + 1 < len(self.expected) and self.expected[index] is unit:
            return self.expected[index + 1]
        return None

    def end_forward(self) -> None:
        self.root = None
        for unit in self.units:
            for group in unit.groups:
                if group.work is not None:
                    group.reshard()

    def begin_backward(self) -> None:
        if self.to_reduce is None:
            order = dict.fromkeys([*reversed(self.started), *self.units])
            self.to_reduce = [unit for unit in order if unit.waits]
            torch.autograd.Variable._execution_engine.queue_callback(self.end_backward)

    def reduce(self, unit: Unit) -> None:
        """``unit`` has its gradients: reduce those whose turn it is."""
        unit.waits = False
        if self.to_reduce is None or unit not in self.to_reduce:
            self._start(unit)
            return
        while self.to_reduce and not self.to_reduce[0].waits:
            self._start(self.to_reduce.pop(0))

    def _start(self, unit: Unit) -> None:
        for group in unit.groups:
            if not unit.synchronizes:
                group.keep_gradients()
            elif any(member.shard.requires_grad for member in group.members):
                self._advance()
                self.reductions.append(Reduction(group))

    def _advance(self) -> None:
        self.reductions = [reduction for reduction in self.reductions if not reduction.advance()]

    def end_backward(self) -> None:
        """Autograd is done: reduce what it has not reached or could not tell, and wait for all."""
        rest = dict.fromkeys([*(self.to_reduce or ()), *(unit for unit in self.units if unit.waits)])
        for unit in rest:
            unit.waits = False
            unit.reshard()
            self._start(unit)
        while self.reductions:
            self._advance()
        self.to_reduce = None
        for unit in self.units:
            unit.reshard()
            unit.uses = 0


class Unit:
    """One module that ``fully_shard`` was applied to, with its groups (one for each dtype)."""

    def __init__(
        self, module: nn.Module, groups: list[Group], reshard_after_forward: bool, policy: Any
    ) -> None:
        self.module, self.groups, self.policy = module, groups, policy
        self.reshard_after_forward = reshard_after_forward
        self.synchronizes = self.prefetches = True
        self.step: Step | None = None
        self.waits = False  # for a reduction since its last forward or backward
        self.uses = 0  # forwards whose backward has not come
        module.register_forward_pre_hook(self.before_forward, prepend=True, with_kwargs=True)
        module.register_forward_hook(self.after_forward)

    def __deepcopy__(self, memo: Any) -> None:
        raise TypeError(
            "a module that fully_shard was applied to cannot be copied: use full_state_dict(module)"
        )

    def gather(self) -> None:
        for group in self.groups:
            group.gather()

    def wait(self) -> None:
        self.gather()
        for group in self.groups:
            group.wait()

    def reshard(self) -> None:
        for group in self.groups:
            group.reshard()

    def before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        step, following = self.step or Step(module), None
        recomputes = in_backward()
        if not recomputes:
            if step.root is None or step.root is self:  # the latter after a forward that raised
                step.begin(self)
            following = step.next_of(self)
        self.wait()
        if following is not None and self.prefetches:
            following.gather()
        dtype = self.policy.param_dtype
        if dtype is not None and self.policy.cast_forward_inputs:
            args, kwargs = cast((args, kwargs), dtype)
        if torch.is_grad_enabled():
            args, kwargs = self._hooked(args, kwargs)
            if not recomputes:
                self.waits, self.uses = True, self.uses + 1
        return args, kwargs

    def _hooked(self, args: Any, kwargs: Any) -> Any:
        leaves, structure = tree_flatten((args, kwargs))
        places = [
            index
            for index, leaf in enumerate(leaves)
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad
        ]
        if not places:
            return args, kwargs
        for place, leaf in zip(places, _AfterBackward.apply(self, *[leaves[i] for i in places]), strict=True):
            leaves[place] = leaf
        return tree_unflatten(leaves, structure)

    def after_forward(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.policy.output_dtype is not None:
            output = cast(output, self.policy.output_dtype)
        if in_backward():
            return output
        step = self.step
        assert step is not None
        if torch.is_grad_enabled():
            leaves = [output] if isinstance(output, torch.Tensor) else tree_flatten(output)[0]
            hook = partial(self.before_backward, step.finished, len(step.finished))
            for leaf in leaves:
                if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                    leaf.register_hook(hook)
        step.finished.append(self)
        if self.reshard_after_forward or not torch.is_grad_enabled():
            self.reshard()
        if step.root is self:
            step.end_forward()
        return output

    def before_backward(self, finished: list[Unit], index: int, gradient: torch.Tensor) -> None:
        assert self.step is not None
        self.step.begin_backward()
        self.waits = True
        self.wait()
        if index and self.prefetches:
            finished[index - 1].gather()

    def after_backward(self) -> None:
        """All of one forward's backward is over; with others to come, their gradients are waited for."""
        assert self.step is not None
        self.uses -= 1
        self.reshard()
        if self.uses <= 0:
            self.step.reduce(self)


def cast(tree: Any, dtype: torch.dtype) -> Any:
    """The floating-point tensors of ``tree`` in ``dtype``."""
    return tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, tree)


def unit_of(module: nn.Module) -> Unit | None:
    """What fully_shard has attached to ``module``."""
    return vars(module).get("fsdp_unit")


def units_of(module: nn.Module) -> list[Unit]:
    """Those of ``module`` and of all modules below it; ValueError: there are none."""
    units = [unit for part in module.modules() if (unit := unit_of(part)) is not None]
    if not units:
        raise ValueError(f"fully_shard was not applied to this {type(module).__name__} nor to a module in it")
    return units
