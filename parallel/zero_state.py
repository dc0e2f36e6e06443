"""The state of a sharded optimizer as checkpoints know it: unsharded as torch.optim's, or one share a rank.

Unsharded state is independent of the number of ranks: it loads on any other, and into the plain optimizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

# State that is not one value an element; of a parameter without dimensions shapes do not tell.
_SCALARS = ("step", "mu_product", "eta", "mu")

if TYPE_CHECKING:
    from parallel.zero import ZeroRedundancyOptimizer


def _numbers(optimizer: ZeroRedundancyOptimizer) -> dict[torch.Tensor, int]:
    """The index in a state dict of each parameter."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return {param: number for number, param in enumerate(params)}


def _groups(optimizer: ZeroRedundancyOptimizer) -> list[dict[str, Any]]:
    """param_groups with indices for parameters, as in torch.optim's state dicts."""
    numbers = _numbers(optimizer)
    return [{**group, "params": [numbers[p] for p in group["params"]]} for group in optimizer.param_groups]


def sharded(optimizer: ZeroRedundancyOptimizer) -> dict[str, Any]:
    """This rank's share: pieces of the state with the elements [first, last) of the parameter they stand
    for."""
    assert optimizer.optim is not None
    numbers = _numbers(optimizer)
    state = {
        numbers[piece.slot.param]: {
            "first": piece.first,
            "last": piece.last,
            **optimizer.optim.state[piece.tensor],
        }
        for piece in optimizer.pieces()
        if piece.tensor in optimizer.optim.state
    }
    return {"state": state, "param_groups": _groups(optimizer)}


def gather(optimizer: ZeroRedundancyOptimizer, to: int) -> dict[str, Any] | None:
    """The unsharded state on the group's rank ``to``, on the CPU; None elsewhere."""
    if not 0 <= to < optimizer.world_size:
        raise ValueError(f"to is {to}; the group has ranks 0 to {optimizer.world_size - 1}")
    mine = {
        number: {n: v.cpu() if isinstance(v, torch.Tensor) else v for n, v in values.items()}
        for number, values in sharded(optimizer)["state"].items()
    }
    shares: list[Any] | None = [None] * optimizer.world_size if optimizer.rank == to else None
    source = dist.get_process_group_ranks(optimizer.process_group)[to]
    dist.gather_object(mine, shares, source, group=optimizer.process_group)
    if shares is None:
        return None
    state: dict[int, dict[str, Any]] = {}
    for param, number in _numbers(optimizer).items():
        pieces = [share[number] for share in shares if number in share]  # ranks own ranges in their order
        if pieces:
            state[number] = {
                name: value for name, value in pieces[0].items() if name not in ("first", "last")
            } | {
                name: torch.cat([piece[name] for piece in pieces]).view(param.shape)
                for name, _ in _elementwise(pieces[0])
            }
    return {"state": state, "param_groups": _groups(optimizer)}


def _elementwise(values: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    """The state that has one value for each element of the parameter."""
    return [(n, v) for n, v in values.items() if isinstance(v, torch.Tensor) and n not in _SCALARS]


def load(optimizer: ZeroRedundancyOptimizer, state_dict: dict[str, Any]) -> None:
    """Slices of an unsharded state into this rank's optimizer.

    ValueError: other numbers of groups or parameters, or a state whose shape is not the parameter's.
    """
    assert optimizer.optim is not None
    theirs, ours = state_dict["param_groups"], optimizer.param_groups
    sizes = [len(group["params"]) for group in theirs], [len(group["params"]) for group in ours]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the state has groups of {sizes[0]} parameters, the optimizer of {sizes[1]}")
    numbers = [number for group in theirs for number in group["params"]]
    index = {param: numbers[place] for param, place in _numbers(optimizer).items()}
    for param, number in index.items():
        for name, value in _elementwise(state_dict["state"].get(number, {})):
            if value.shape != param.shape:
                raise ValueError(
                    f"{name} of parameter {number} has shape {list(value.shape)} in the state; the parameter "
                    f"has {list(param.shape)}"
                )
    state: dict[int, dict[str, Any]] = {}
    for number, piece in enumerate(optimizer.pieces()):
        values = state_dict["state"].get(index[piece.slot.param])
        if values is not None:
            # The optimizer counts in place: nothing is shared with the caller's state, nor between ranks.
            state[number] = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in values.items()}
            for name, value in _elementwise(values):
                state[number][name] = value.reshape(-1)[piece.first : piece.last].clone()
    inner = optimizer.optim.state_dict()["param_groups"]
    settings = [{k: v for k, v in g.items() if k not in ("params", "param_names")} for g in theirs]
    groups = [{**g, **new, "params": g["params"]} for g, new in zip(inner, settings, strict=True)]
    optimizer.optim.load_state_dict({"state": state, "param_groups": groups})
    for group, new in zip(ours, settings, strict=True):
        group.update(new)
