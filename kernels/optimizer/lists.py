"""Lists of tensors that an optimizer updates together: equal in number, shapes and memory layout.

These run over every tensor at every step: functions in C are mapped over the lists, not expressions of
Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter

import torch

Tensors = Sequence[torch.Tensor]

dtype_of, device_of, shape_of, layout_of = map(attrgetter, ("dtype", "device", "shape", "layout"))
address_of, elements_of = torch.Tensor.data_ptr, torch.Tensor.numel
_is_contiguous = torch.Tensor.is_contiguous


def check_equal(params: Tensors, grads: Tensors, states: Sequence[Tensors], steps: Tensors) -> None:
    """ValueError unless the lists fit together, so that one loop may run through their memory."""
    if not params:
        raise ValueError("params is empty: there is nothing to update")
    shapes = list(map(shape_of, params))
    given = [("params", params), ("grads", grads), *(("states", state) for state in states if state)]
    for name, tensors in given:
        if list(map(shape_of, tensors)) != shapes:
            raise ValueError(f"{name} are not as many and of the shapes of params: one for each parameter")
        if len(set(map(dtype_of, tensors))) > 1:
            raise ValueError(f"{name} have several dtypes; one call takes tensors of one dtype")
    if not steps:
        return
    if len(steps) != len(shapes) or set(map(elements_of, steps)) != {1} or len(set(map(dtype_of, steps))) > 1:
        raise ValueError("state_steps are not one tensor of one element for each parameter, all of one dtype")


def check_device(params: Tensors, grads: Tensors, states: Sequence[Tensors]) -> None:
    """ValueError unless all are on one device. (On a CPU torch's dispatcher has seen to it.)"""
    devices = set(map(device_of, chain(params, grads, *states)))
    if len(devices) > 1:
        raise ValueError(f"the tensors are on {', '.join(sorted(map(str, devices)))}, not on one device")


def one_layout(
    params: Tensors, grads: Tensors, states: Sequence[Tensors]
) -> tuple[list[Tensors], list[tuple[torch.Tensor, torch.Tensor]]]:
    """([params, grads, *states], copies), tensors of one index with their elements in one order without gaps.

    Tensors that lie otherwise are replaced by copies; ``copies`` are those of parameters and states, as
    (original, copy), for ``copy_back`` when they have been updated.
    """
    lists: list[Tensors] = [params, grads, *states]
    if all(map(_is_contiguous, chain(*lists))):
        return lists, []
    changed = [list(tensors) for tensors in lists]
    copies = []
    for index, param in enumerate(params):
        layout = torch.empty_like(param)  # the parameter's own layout where it has no gaps
        for place, tensors in enumerate(changed):
            if not tensors or (tensor := tensors[index]).stride() == layout.stride():
                continue
            tensors[index] = torch.empty_like(layout, dtype=tensor.dtype).copy_(tensor)
            if place != 1:
                copies.append((tensor, tensors[index]))
    return [*changed], copies


def copy_back(copies: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """The copies' values into the originals."""
    for original, copy in copies:
        original.copy_(copy)


def counted(steps: Tensors) -> torch.Tensor:
    """float64 (tensors,) where the steps are: one more for each, which is stored."""
    torch._foreach_add_(list(steps), 1)
    if steps[0].device.type == "cpu":
        return torch.tensor([step.item() for step in steps], dtype=torch.float64)
    return torch.stack([step.reshape(()) for step in steps]).double()
