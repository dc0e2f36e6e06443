"""Gradient clipping by the norm of whole gradients, of which every rank holds shards."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from parallel.fsdp_group import Member
from parallel.fsdp_runtime import units_of


@torch.no_grad()
def clip_grad_norm_(module: nn.Module, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
    """``torch.nn.utils.clip_grad_norm_`` where ``fully_shard`` was applied, all ranks together.

    norm_type: positive, or infinity. Returns the norm before clipping, the same bits on every rank. It costs
    an all-reduce of one number for each mesh and, where layers of ``parallel.tensor`` say that a parameter is
    local to a rank, for each of their groups; what all ranks of such a group hold alike counts once.
    """
    units_of(module)
    if not norm_type > 0:
        raise ValueError(f"norm_type is positive or infinity, not {norm_type}")
    local = _tensor_parallel(module)
    parts: dict[tuple[dist.ProcessGroup | None, dist.ProcessGroup | None], list[torch.Tensor]] = {}
    device = next(module.parameters()).device
    for parameter in module.parameters():
        member: Member | None = getattr(parameter, "fsdp", None)
        group, counts = local.get(parameter, (None, True))
        gradients = parts.setdefault((member.group.mesh.shard if member else None, group), [])
        device = member.group.mesh.device if member else device
        if parameter.grad is not None and parameter.grad.numel() and counts:
            gradients.append(parameter.grad)
    norms = []
    for groups, gradients in parts.items():
        norm = torch.nn.utils.get_total_norm(gradients, norm_type).to(device)
        for group in groups:
            if group is not None:
                norm = _norm_of_parts(norm, norm_type, group)
        norms.append(norm)
    total = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    torch.nn.utils.clip_grads_with_norm_(module.parameters(), max_norm, total)
    return total


def _norm_of_parts(norm: torch.Tensor, norm_type: float, group: dist.ProcessGroup) -> torch.Tensor:
    """The norm of a vector of which every rank has a part, from the norms of the parts."""
    if norm_type == float("inf"):
        dist.all_reduce(norm, dist.ReduceOp.MAX, group=group)
        return norm
    power = norm**norm_type
    dist.all_reduce(power, group=group)
    return power ** (1.0 / norm_type)


def _tensor_parallel(module: nn.Module) -> dict[nn.Parameter, tuple[dist.ProcessGroup, bool]]:
    """Parameters local to a rank of a tensor-parallel group -> (group, whether they count on this rank: what
    several ranks hold counts on the lowest)."""
    found: dict[nn.Parameter, tuple[dist.ProcessGroup, bool]] = {}
    for name, layer in module.named_modules():
        if not callable(shards := getattr(layer, "shards", None)):
            continue
        group = layer.group or dist.group.WORLD
        rank = dist.get_rank(group)
        for parameter, (partition, _) in shards().items():
            below = {piece for pieces in partition.ranges[:rank] for piece in pieces}
            alone = {piece not in below for piece in partition.ranges[rank]}
            if len(alone) > 1:
                raise ValueError(
                    f"{name}.{parameter}: rank {rank} holds a part alone and a part that lower ranks hold "
                    "too; its norm cannot be counted once: split the layer in two"
                )
            found[getattr(layer, parameter)] = group, alone != {False}
    return found
