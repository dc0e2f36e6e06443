"""Lists of tensors that an optimizer updates together: equal in number, shapes and memory layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

Tensors = Sequence[torch.Tensor]


def check_equal(params: Tensors, grads: Tensors, states: Sequence[Tensors], steps: Tensors) -> None:
    """ValueError unless the lists fit together, so that one loop may run through their memory."""
    shapes = [param.shape for param in params]
    device = params[0].device
    for name, tensors in (("params", params), ("grads", grads), *(("states", state) for state in states)):
        if not tensors and name == "states":
            continue
        if [tensor.shape for tensor in tensors] != shapes:
            raise ValueError(
                f"{name} are not as many and as large as params: one of each shape for each parameter"
            )
        if len({tensor.dtype for tensor in tensors}) > 1:
            raise ValueError(f"{name} have several dtypes; one call takes tensors of one dtype")
        if any(tensor.device != device for tensor in tensors):
            raise ValueError(f"{name} are not all on {device}, where the first parameter is")
    if steps and (len(steps) != len(shapes) or len({step.dtype for step in steps}) > 1):
        raise ValueError("state_steps are not one tensor for each parameter, of one dtype")
    if any(step.numel() != 1 for step in steps):
        raise ValueError("state_steps are not tensors of one element")


@contextmanager
def in_one_layout(
    params: Tensors, grads: Tensors, states: Sequence[Tensors]
) -> Iterator[tuple[Tensors, Tensors, Sequence[Tensors]]]:
    """The lists such that tensors of one index have their elements in one order, without gaps.

    Parameters and states that do not are copied, and the copies are copied back at the end.
    """
    lists = [params, grads, *(state for state in states if state)]
    if all(tensor.is_contiguous() for tensors in lists for tensor in tensors):
        yield params, grads, states
        return
    changed = [list(tensors) for tensors in (params, grads, *states)]
    back: list[tuple[torch.Tensor, torch.Tensor]] = []
    for index, param in enumerate(params):
        layout = torch.empty_like(param)  # the parameter's own layout where it has no gaps
        for place, tensors in enumerate(changed):
            if not tensors or (tensor := tensors[index]).stride() == layout.stride():
                continue
            tensors[index] = layout.clone().copy_(tensor)
            if place != 1:
                back.append((tensor, tensors[index]))
    yield changed[0], changed[1], changed[2:]
    for original, copy in back:
        original.copy_(copy)


def counted(steps: Tensors) -> torch.Tensor:
    """float64 (tensors,) where the steps are: one more for each, which is stored."""
    torch._foreach_add_(list(steps), 1)
    if steps[0].device.type == "cpu":
        return torch.tensor([step.item() for step in steps], dtype=torch.float64)
    return torch.stack([step.reshape(()) for step in steps]).double()
