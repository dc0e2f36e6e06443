"""All ranks have the same module: they compare what it is made of, then take one rank's values.

Every strategy begins so. A module that was built differently on one rank shows in the first collective on its
tensors, as a hang or as garbage; compared by name, shape, dtype and whether it is trained, it is an error
that names the tensor, on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from parallel.together import waiting_for_others

BROADCAST_BYTES = 25 << 20
"""Tensors up to this size together are broadcast in one call."""


def described(named: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """What ranks compare of tensors: "head.weight float32 [13, 6]", "(frozen)" where it is not trained."""
    return [
        f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        + (" (frozen)" if isinstance(tensor, nn.Parameter) and not tensor.requires_grad else "")
        for name, tensor in named
    ]


def check_alike(
    what: str,
    facts: Sequence[str],
    group: dist.ProcessGroup | None = None,
    remedy: str = "build the same module on every rank",
) -> None:
    """ValueError, the same on every rank, unless all ranks of the group have the same ``facts``, in order.

    what: they are, in the plural.
    """
    world = dist.get_world_size(group)
    if world == 1:
        return
    found: list[Any] = [None] * world
    with waiting_for_others(f"their {what}", group):
        dist.all_gather_object(found, list(facts), group=group)
    members = dist.get_process_group_ranks(group or dist.group.WORLD)
    for rank, theirs in zip(members, found, strict=True):
        for first, other in zip_longest(found[0], theirs, fillvalue="nothing more"):
            if first != other:
                raise ValueError(
                    f"{what} differ between ranks: {first} on rank {members[0]}, {other} on rank {rank}; "
                    f"{remedy}"
                )


def synchronise_module(
    module: nn.Module, process_group: dist.ProcessGroup | None = None, rank: int = 0
) -> None:
    """Parameters and buffers of every rank become those of the group's ``rank``.

    Tensors on the meta device have no values. ValueError on every rank where they differ in number, name,
    shape or dtype, or in what is frozen.
    """
    named = [*module.named_parameters(), *module.named_buffers()]
    check_alike("parameters and buffers", described(named), process_group)
    broadcast_from(rank, [tensor for _, tensor in named if not tensor.is_meta], process_group)


def broadcast_from(
    rank: int, tensors: Sequence[torch.Tensor], group: dist.ProcessGroup | None = None
) -> None:
    """Copies of one group rank's tensors into everybody's: many in a call, as bytes, whatever their dtypes.

    A call has a copy of at most ``BROADCAST_BYTES``, or of the one tensor that is larger.
    """
    if dist.get_world_size(group) == 1:
        return
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        together: list[torch.Tensor] = []
        for tensor in [t.detach() for t in tensors if t.device == device and t.numel()]:
            if together and sum(t.nbytes for t in together) + tensor.nbytes > BROADCAST_BYTES:
                _broadcast_together(rank, together, group)
                together = []
            together.append(tensor)
        if together:
            _broadcast_together(rank, together, group)


def _broadcast_together(rank: int, tensors: Sequence[torch.Tensor], group: dist.ProcessGroup | None) -> None:
    flat = torch.empty(sum(t.nbytes for t in tensors), dtype=torch.uint8, device=tensors[0].device)
    pieces = flat.split([tensor.nbytes for tensor in tensors])
    mine = dist.get_rank(group) == rank
    if mine:
        for piece, tensor in zip(pieces, tensors, strict=True):
            piece.copy_(tensor.contiguous().view(-1).view(torch.uint8))
    with waiting_for_others(f"rank {rank}'s tensors ({flat.numel()} bytes)", group):
        root = dist.get_process_group_ranks(group or dist.group.WORLD)[rank]
        dist.broadcast(flat, root, group=group)
    if not mine:
        for piece, tensor in zip(pieces, tensors, strict=True):
            # A dtype's view wants its own alignment, which a piece behind smaller elements may lack.
            tensor.copy_(piece.clone().view(tensor.dtype).view(tensor.shape))
