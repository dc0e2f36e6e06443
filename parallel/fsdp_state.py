"""Whole state dicts of a module that ``fully_shard`` was applied to, and of its optimizer; and their parts.

Those that are called full communicate: every rank calls them. ``module.state_dict()`` does not, and holds
shards, of which nothing says what they are parts of; ``module_parts`` and ``optimizer_parts`` do.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from parallel.fsdp_group import Group, Member
from parallel.fsdp_runtime import unit_of, units_of
from parallel.sharded import Sharded

COUNTERS = ("step", "mu_product", "eta", "mu")
"""State of torch's optimizers that is one number for a whole parameter."""


def sharded(tensor: Any) -> Member | None:
    """How a registered parameter is sharded; None of a buffer or a parameter that is not."""
    return getattr(tensor, "fsdp", None)


def sharded_part(layout: Member, shard: torch.Tensor) -> Sharded:
    """The shard of a parameter, or of what an optimizer keeps for it, as a checkpoint takes it."""
    return Sharded(shard, tuple(layout.shape), layout.start * layout.shape[1:].numel())


def _settle(groups: Iterable[Group]) -> None:
    """Nothing is gathered, and what was put in a shard's place has been taken over."""
    for group in dict.fromkeys(groups):
        group.reshard()
        group.refresh()


def _layouts(module: nn.Module) -> dict[str, Member]:
    """The names under which shards are registered in a module or in a part of one."""
    groups = [group for part in module.modules() if (unit := unit_of(part)) for group in unit.groups]
    groups += [layout.group for parameter in module.parameters() if (layout := sharded(parameter))]
    _settle(groups)
    named = module.named_parameters(remove_duplicate=False)
    return {name: layout for name, parameter in named if (layout := sharded(parameter))}


def module_parts(module: nn.Module) -> dict[str, Any]:
    """``module.state_dict()``, its shards said to be parts of whole tensors; nothing is copied.

    ValueError: a hook on it gives something else in a shard's place.
    """
    layouts = _layouts(module)
    state = module.state_dict()
    for name, layout in layouts.items():
        shape = tuple(state[name].shape) if name in state else "nothing"
        if shape != layout.shard_shape:
            raise ValueError(
                f"state_dict gives {shape} for {name}; this rank's shard is {layout.shard_shape}"
            )
        state[name] = sharded_part(layout, state[name])
    return state


def optimizer_parts(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()``, what it keeps for each number of a shard said to be part of a whole.

    ValueError: it keeps something else of a shard, of which nothing says what it is a part of.
    """
    state_dict = optimizer.state_dict()
    state = dict(state_dict["state"])
    for number, parameter in numbered(optimizer, state_dict).items():
        if (layout := sharded(parameter)) and number in state:
            state[number] = {
                key: _part_of_state(layout, parameter, key, value) for key, value in state[number].items()
            }
    return {**state_dict, "state": state}


def _part_of_state(layout: Member, parameter: torch.Tensor, key: str, value: Any) -> Any:
    if _is_shard(value, parameter):
        return sharded_part(layout, value)
    tensors = value if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(each, torch.Tensor) and each.dim() for each in tensors):
        raise ValueError(
            f"{key} is not one value for each element of a parameter {tuple(layout.shape)} that is sharded: "
            "a checkpoint cannot tell what it belongs to"
        )
    return value


def numbered(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> dict[int, torch.Tensor]:
    """The optimizer's parameters by the numbers that its state dict has for them."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    return dict(zip(numbers, parameters, strict=False))


def new_state(parameter: torch.Tensor, key: str, shape: tuple[int, ...] | None, dtype: Any) -> Any:
    """Zeros for what an optimizer will keep under ``key`` for each number of the parameter; None where what
    is kept in ``shape`` is something else."""
    layout = sharded(parameter)
    if key in COUNTERS or shape != tuple(layout.shape if layout else parameter.shape):
        return None
    zeros = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    return sharded_part(layout, zeros) if layout else zeros


def local(value: Any) -> Any:
    """A nested value, in which dictionaries are filled anew: shards where parts of whole tensors stood."""
    if isinstance(value, Sharded):
        return value.local
    if isinstance(value, dict):
        value.update({key: local(item) for key, item in value.items()})
        return value
    return type(value)(map(local, value)) if type(value) in (list, tuple) else value


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    _settle(group for unit in units_of(module) for group in unit.groups)
    return module.state_dict(keep_vars=True)


@torch.no_grad()
def full_state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of the module as before ``fully_shard``: names, whole shapes, dtypes; on every rank.

    Parameters that are tied are one tensor. Tensors are copies, on the device where the shards live.
    """
    copies: dict[torch.Tensor, torch.Tensor] = {}
    state = _state(module)
    for tensor in state.values():
        if tensor not in copies:
            layout = sharded(tensor)
            copies[tensor] = layout.gather(tensor) if layout else tensor.detach().clone()
    return {name: copies[tensor] for name, tensor in state.items()}


@torch.no_grad()
def load_full_state_dict(module: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> None:
    """The inverse: every rank gives the whole state dict and takes its shards of it.

    ValueError: names or shapes are not the module's; nothing has been loaded then.
    """
    state = _state(module)
    wrong = [f"missing {name}" for name in state if name not in state_dict]
    wrong += [f"unexpected {name}" for name in state_dict if name not in state]
    for name, tensor in state.items():
        shape = layout.shape if (layout := sharded(tensor)) else tensor.shape
        if name in state_dict and state_dict[name].shape != shape:
            wrong.append(f"{name} of {tuple(state_dict[name].shape)} where the module has {tuple(shape)}")
    if wrong:
        raise ValueError("the state dict does not fit: " + ", ".join(wrong))
    for name, tensor in state.items():
        layout = sharded(tensor)
        tensor.copy_(layout.take(state_dict[name]) if layout else state_dict[name])


def _named(module: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    names = {parameter: name for name, parameter in reversed(list(module.named_parameters()))}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in names:
                raise ValueError(
                    f"the optimizer has a parameter of {tuple(parameter.shape)} that the module has not: "
                    "make the optimizer after fully_shard"
                )
            yield names[parameter], parameter


@torch.no_grad()
def full_optimizer_state_dict(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()`` with names instead of numbers and whole tensors instead of shards.

    ValueError: the optimizer has parameters that are not the module's shards.
    """
    _state(module)
    names = {parameter: name for name, parameter in _named(module, optimizer)}
    state = {}
    for parameter, name in names.items():
        layout = sharded(parameter)
        state[name] = {
            key: layout.gather(value) if layout and _is_shard(value, parameter) else copy.deepcopy(value)
            for key, value in optimizer.state[parameter].items()
        }
    groups = [
        {**group, "params": [names[parameter] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    return {"state": state, "param_groups": groups}


@torch.no_grad()
def load_full_optimizer_state_dict(
    module: nn.Module, optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]
) -> None:
    """The inverse, for an optimizer with the same parameter groups, over any number of ranks.

    ValueError: the names in the state dict's groups are not those of the optimizer's.
    """
    _state(module)
    found = [[name for name in group["params"]] for group in state_dict["param_groups"]]
    named = list(_named(module, optimizer))
    order = iter(named)
    wanted = [[next(order)[0] for _ in group["params"]] for group in optimizer.param_groups]
    if found != wanted:
        raise ValueError(f"the optimizer's parameter groups are {wanted}; the state dict has {found}")
    state: dict[int, dict[str, Any]] = {}
    for number, (name, parameter) in enumerate(named):
        layout = sharded(parameter)
        if name in state_dict["state"]:
            state[number] = {
                key: layout.take(value).clone()
                if layout and _is_whole(key, value, layout)
                else copy.deepcopy(value)
                for key, value in state_dict["state"][name].items()
            }
    numbers = iter(range(len(named)))
    groups = [
        {**group, "params": [next(numbers) for _ in group["params"]]} for group in state_dict["param_groups"]
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _is_shard(value: Any, parameter: nn.Parameter) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.dim() > 0


def _is_whole(key: str, value: Any, layout: Member) -> bool:
    """Of a parameter without dimensions shapes do not tell; counters are named."""
    return isinstance(value, torch.Tensor) and value.shape == layout.shape and key not in COUNTERS
